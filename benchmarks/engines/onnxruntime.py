"""ONNX Runtime on a CPU or a CUDA device, every graph optimisation on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import Runner, cuda_available, module_available
from .onnx_file import BATCH, INPUT, OUTPUT, any_batch_bytes, can_export

__all__ = ["OnnxRuntime"]


@dataclass(frozen=True)
class OnnxRuntime:
    """device: "cpu" or "cuda". The number of threads is torch's at the time of building."""

    name: str = "onnxruntime"
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    slow_build: bool = False
    any_batch: bool = False

    @property
    def _provider(self) -> str:
        return "CUDAExecutionProvider" if self.device == "cuda" else "CPUExecutionProvider"

    def available(self) -> tuple[bool, str]:
        """Where onnxruntime and onnx are installed, with this device's provider."""
        for able, reason in (module_available("onnxruntime"), can_export()):
            if not able:
                return False, reason
        import onnxruntime

        if self._provider not in onnxruntime.get_available_providers():
            return False, f"this onnxruntime has no {self._provider} (onnxruntime-gpu has)"
        return cuda_available() if self.device == "cuda" else (True, "")

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """A session for the example's shape; on a GPU input and output stay in its memory."""
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.log_severity_level = 3
        settings.add_free_dimension_override_by_name(BATCH, len(example))
        session = onnxruntime.InferenceSession(
            any_batch_bytes(model, example), settings, providers=[self._provider]
        )
        if self.device == "cuda":
            return _on_gpu(session, example)
        return lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])


def _on_gpu(session: object, example: Tensor) -> Runner:
    import numpy as np

    shape = session.get_outputs()[0].shape  # type: ignore[attr-defined]
    result = torch.empty(*shape, device=example.device)
    index = example.device.index or 0

    def run(x: Tensor) -> Tensor:
        x = x.contiguous()
        binding = session.io_binding()  # type: ignore[attr-defined]
        binding.bind_input(INPUT, "cuda", index, np.float32, tuple(x.shape), x.data_ptr())
        binding.bind_output(OUTPUT, "cuda", index, np.float32, tuple(result.shape), result.data_ptr())
        session.run_with_iobinding(binding)  # type: ignore[attr-defined]
        return result

    return run
