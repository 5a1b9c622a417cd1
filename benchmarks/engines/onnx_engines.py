"""Engines that read ONNX: ONNX Runtime and OpenVINO; and the export for them and for TensorRT."""

import copy
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPBackendError

from .base import Engine, Runner

INPUT, OUTPUT = "x", "logits"
_BATCH = "batch"  # name of the dynamic first axis
_OPSET = 20

_exported: WeakKeyDictionary[nn.Module, bytes] = WeakKeyDictionary()


def any_batch_bytes(model: nn.Module, example: Tensor) -> bytes:
    """``model`` as ONNX in float32 with a dynamic first axis, exported once per module.

    Engines fix the batch size before they optimise; one export per batch size took most of their build time.
    """
    if model not in _exported:
        _exported[model] = onnx_bytes(
            model, example[:1], dynamic_axes={name: {0: _BATCH} for name in (INPUT, OUTPUT)}
        )
    return _exported[model]


def onnx_bytes(
    model: nn.Module, example: Tensor, dtype: torch.dtype = torch.float32, **settings: Any
) -> bytes:
    """``model`` in eval mode as ONNX with weights, input and output of ``dtype``, for the example's shape."""
    network = copy.deepcopy(model).eval().to("cpu", dtype)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), torch.no_grad():
        file = Path(folder) / "network.onnx"
        # The TorchScript exporter: it does not need onnxscript, and every engine reads its graphs.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (example.to("cpu", dtype),),
            file,
            dynamo=False,
            opset_version=_OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            **settings,
        )
        return file.read_bytes()


@dataclass(frozen=True)
class OnnxRuntime(Engine):
    """ONNX Runtime with all graph optimisations, with as many threads as torch has when it is built."""

    device: str = "cpu"

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        import onnxruntime

        provider: Any = "CPUExecutionProvider"
        if self.device == "cuda":
            provider = ("CUDAExecutionProvider", {"use_tf32": str(int(self.tf32))})
            if provider[0] not in onnxruntime.get_available_providers():
                raise DSPBackendError(f"this onnxruntime has no {provider[0]} (onnxruntime-gpu has)")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.log_severity_level = 3
        settings.add_free_dimension_override_by_name(_BATCH, len(example))
        file = any_batch_bytes(model, example)
        session = onnxruntime.InferenceSession(file, settings, providers=[provider])
        if self.device == "cuda":
            return _on_gpu(session, example)
        return lambda x: torch.from_numpy(session.run([OUTPUT], {INPUT: x.numpy()})[0])


def _on_gpu(session: Any, example: Tensor) -> Runner:
    """Input and output stay in the GPU's memory."""
    import numpy as np

    result = torch.empty(*session.get_outputs()[0].shape, device=example.device)
    index = example.device.index or 0

    def run(x: Tensor) -> Tensor:
        x = x.contiguous()
        binding = session.io_binding()
        binding.bind_input(INPUT, "cuda", index, np.float32, tuple(x.shape), x.data_ptr())
        binding.bind_output(OUTPUT, "cuda", index, np.float32, tuple(result.shape), result.data_ptr())
        session.run_with_iobinding(binding)
        return result

    return run


@cache
def _core() -> Any:
    """The process's only OpenVINO core, kept until the process ends.

    Each core's CPU plugin installs a signal stack and restores the previous one when it is destroyed. If two
    are not destroyed in reverse order, the stack is in unmapped memory and the next signal kills the process.
    """
    import openvino

    return openvino.Core()


@dataclass(frozen=True)
class OpenVINO(Engine):
    """OpenVINO, the fastest dense engine on a CPU, in float32, or bfloat16 where the processor has it."""

    device: str = "cpu"

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        request = self._compile(model, example).create_infer_request()

        def run(x: Tensor) -> Tensor:
            # Shared memory on both sides: the next call overwrites the result.
            return torch.from_numpy(request.infer({0: x.numpy()}, share_inputs=True, share_outputs=True)[0])

        return run

    def profile(self, model: nn.Module, example: Tensor) -> list[tuple[str, float]]:
        """(node name and kind, seconds) of each node that took time in one call."""
        request = self._compile(model, example, PERF_COUNT=True).create_infer_request()
        for _ in range(3):
            request.infer({0: example.numpy()})
        return [
            (f"{node.node_name} {node.exec_type}", node.real_time.total_seconds())
            for node in request.get_profiling_info()
            if node.real_time.total_seconds() > 0
        ]

    def _compile(self, model: nn.Module, example: Tensor, **extra: Any) -> Any:
        half = self.dtype == torch.bfloat16
        if half and "BF16" not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise DSPBackendError("this processor has no bfloat16 arithmetic (AVX512-BF16 or AMX)")
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
            **extra,
        }
        network = _core().read_model(any_batch_bytes(model, example))
        network.reshape(list(example.shape))
        return _core().compile_model(network, "CPU", settings)
