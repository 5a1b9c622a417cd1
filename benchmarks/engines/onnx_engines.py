"""Engines that read ONNX: ONNX Runtime and OpenVINO; and the export for them and for TensorRT."""

import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, wraps
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
_CALIBRATED = 16  # images that pass through a network together to find the ranges of its values
# OpenVINO's names of a precision: the hint, and the processor's capability.
_HINTS = {torch.float32: ("f32", "FP32"), torch.bfloat16: ("bf16", "BF16"), torch.float16: ("f16", "FP16")}


def _once_per_module(make: Callable[[nn.Module, Any], Any]) -> Callable[[nn.Module, Any], Any]:
    """Keep what is made of a module while that lives: engines are built anew for each batch size."""
    made: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

    @wraps(make)
    def kept(model: nn.Module, images: Tensor) -> Any:
        if model not in made:
            made[model] = make(model, images)
        return made[model]

    return kept


@_once_per_module
def any_batch_bytes(model: nn.Module, example: Tensor) -> bytes:
    """``model`` as ONNX in float32 with a dynamic first axis, which engines fix before they optimise."""
    return onnx_bytes(model, example[:1], dynamic_axes={name: {0: _BATCH} for name in (INPUT, OUTPUT)})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the progress bars and the warnings of the quantisers."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


@_once_per_module
def qdq_bytes(model: nn.Module, images: Tensor) -> bytes:
    """``model`` as ONNX with 8-bit weights and values, by ONNX Runtime's own tools; one scale per filter."""
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images.split(_CALIBRATED))

        def get_next(self) -> dict[str, Any] | None:
            return next(({INPUT: batch.numpy()} for batch in self.batches), None)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        whole, prepared, result = (Path(folder) / f"{name}.onnx" for name in ("whole", "prepared", "result"))
        whole.write_bytes(any_batch_bytes(model, images))
        quant_pre_process(whole, prepared, skip_symbolic_shape=True)
        quantize_static(prepared, result, Images(), per_channel=True, activation_type=QuantType.QUInt8)
        return result.read_bytes()


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
    """ONNX Runtime with all graph optimisations and torch's number of threads, in float32 or int8."""

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
        int8 = self.dtype == torch.int8
        file = qdq_bytes(model, self.images) if int8 else any_batch_bytes(model, example)
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


@_once_per_module
def _nncf_network(model: nn.Module, images: Tensor) -> Any:
    """``model`` for OpenVINO with 8-bit weights and values, by its own tool: post-training quantisation."""
    import nncf

    network = _core().read_model(any_batch_bytes(model, images))
    batches = [batch.numpy() for batch in images.split(_CALIBRATED)]
    with _quiet():
        return nncf.quantize(network, nncf.Dataset(batches), subset_size=len(batches))


@dataclass(frozen=True)
class OpenVINO(Engine):
    """OpenVINO, the fastest dense engine on a CPU: in float32, 16 bit where the processor has it, or int8."""

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
        hint, needed = _HINTS.get(self.dtype, ("", "FP32"))
        if needed not in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise DSPBackendError(
                f"this processor has no {str(self.dtype).removeprefix('torch.')} arithmetic"
            )
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            **extra,
        }
        if self.dtype == torch.int8:  # layers that stay in float have OpenVINO's own choice of precision
            network = _nncf_network(model, self.images).clone()
        else:
            settings["INFERENCE_PRECISION_HINT"] = hint
            network = _core().read_model(any_batch_bytes(model, example))
        network.reshape(list(example.shape))
        return _core().compile_model(network, "CPU", settings)
