"""OpenVINO on a CPU: the strongest dense engine there, in float32 or bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .base import Runner, module_available
from .onnx_file import any_batch_bytes, can_export

__all__ = ["OpenVINO"]

_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


@cache
def _core() -> Any:
    """The only one of this process, kept until it ends.

    Each core's CPU plugin gives the thread a signal stack and, when it goes, the one before it: of two that
    do not go in reverse order the last leaves memory that is unmapped, and the next signal (an interrupt, the
    end of a child process) kills the process without a word.
    """
    import openvino

    return openvino.Core()


@dataclass(frozen=True)
class OpenVINO:
    """dtype: float32, or bfloat16 where the processor has it. Threads are torch's at the time of building."""

    name: str = "openvino"
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    slow_build: bool = False
    any_batch: bool = False

    def available(self) -> tuple[bool, str]:
        """Where openvino and onnx are installed and the processor has the precision."""
        for able, reason in (module_available("openvino"), can_export()):
            if not able:
                return False, reason
        capabilities = _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if self.dtype == torch.bfloat16 and "BF16" not in capabilities:
            return False, "this processor has no bfloat16 arithmetic (AVX512-BF16 or AMX)"
        return True, ""

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """One latency-tuned infer request for the example's shape."""
        request = self._compile(model, example).create_infer_request()

        def run(x: Tensor) -> Tensor:
            # Shared memory on both sides: the next call overwrites the result.
            return torch.from_numpy(request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)[0])

        return run

    def profile(self, model: nn.Module, example: Tensor) -> list[tuple[str, float]]:
        """(node and kind, seconds) of every node that took time in one call."""
        request = self._compile(model, example, PERF_COUNT=True).create_infer_request()
        for _ in range(3):
            request.infer({0: example.numpy()})
        return [
            (f"{node.node_name} {node.exec_type}", node.real_time.total_seconds())
            for node in request.get_profiling_info()
            if node.real_time.total_seconds() > 0
        ]

    def _compile(self, model: nn.Module, example: Tensor, **extra: Any) -> Any:
        core = _core()
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _PRECISIONS[self.dtype],
            **extra,
        }
        network = core.read_model(any_batch_bytes(model, example))
        network.reshape(list(example.shape))
        return core.compile_model(network, "CPU", settings)
