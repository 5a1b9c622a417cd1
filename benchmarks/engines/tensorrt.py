"""TensorRT 10.x and 11.x: ONNX in, strongly typed network, engine cached on disk, run in a CUDA graph."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.whole_file import write_bytes

from .base import Runner, cuda_available, module_available
from .cuda_graph import capture
from .onnx_file import INPUT, OUTPUT, can_export, onnx_bytes

__all__ = ["TensorRT", "build_engine", "cache_folder"]

_WORKSPACE_BYTES = 4 << 30


def cache_folder() -> Path:
    """Where built engines and the timing cache are kept: $DSP_TENSORRT_CACHE, else ~/.cache/dsp-kernels."""
    return Path(os.environ.get("DSP_TENSORRT_CACHE") or Path.home() / ".cache" / "dsp-kernels" / "tensorrt")


@dataclass(frozen=True)
class TensorRT:
    """dtype: float32 (TF32 off, so that it is what it says) or float16."""

    name: str = "tensorrt"
    dtype: torch.dtype = torch.float32
    device: str = "cuda"
    slow_build: bool = True
    any_batch: bool = False

    def available(self) -> tuple[bool, str]:
        """Where the tensorrt package, onnx and a CUDA device are there."""
        if not (found := module_available("tensorrt", extra=""))[0]:
            return False, f"{found[1]}; it comes from NVIDIA's own index"
        for able, reason in (can_export(), cuda_available()):
            if not able:
                return False, reason
        return True, ""

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """Builds or reads the engine for the example's shape and captures its execution in a CUDA graph."""
        import tensorrt

        plan = build_engine(
            onnx_bytes(model, example, self.dtype), torch.cuda.get_device_name(example.device)
        )
        engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR)).deserialize_cuda_engine(plan)
        context = engine.create_execution_context()
        static_input = example.to(self.dtype).contiguous().clone()
        static_output = torch.empty(
            tuple(engine.get_tensor_shape(OUTPUT)), dtype=self.dtype, device=example.device
        )
        context.set_tensor_address(INPUT, static_input.data_ptr())
        context.set_tensor_address(OUTPUT, static_output.data_ptr())

        def execute() -> Tensor:
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise DSPBackendError("TensorRT could not enqueue the network")
            return static_output

        graph, _ = capture(execute)

        def run(x: Tensor) -> Tensor:
            static_input.copy_(x)
            graph.replay()
            return static_output.float()

        # The context and engine must outlive the graph that holds their kernels.
        run.keep = (engine, context)  # type: ignore[attr-defined]
        return run


def build_engine(network: bytes, gpu: str) -> bytes:
    """The serialized engine of an ONNX network, from the disk cache where it was built before.

    The key is the content: ONNX bytes, TensorRT's version, the GPU's name.
    Raises DSPBackendError where TensorRT cannot parse or build it, with its own message.
    """
    import tensorrt

    key = hashlib.sha256(network + tensorrt.__version__.encode() + gpu.encode()).hexdigest()
    path = cache_folder() / f"{key}.engine"
    if path.is_file():
        return path.read_bytes()
    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    definition = builder.create_network(_creation_flags(tensorrt))
    parser = tensorrt.OnnxParser(definition, logger)
    if not parser.parse(network):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise DSPBackendError(f"TensorRT cannot read the network: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
    config.clear_flag(tensorrt.BuilderFlag.TF32)
    timings = cache_folder() / f"timing-{tensorrt.__version__}.cache"
    cache = config.create_timing_cache(timings.read_bytes() if timings.is_file() else b"")
    config.set_timing_cache(cache, False)
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise DSPBackendError("TensorRT could not build the network; its log on standard error says why")
    write_bytes(timings, bytes(cache.serialize()))
    write_bytes(path, bytes(plan))
    return bytes(plan)


def _creation_flags(tensorrt: Any) -> int:
    # 10.x has to be asked for a strongly typed network; 11.x knows no other kind and drops the flag.
    flag = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)
