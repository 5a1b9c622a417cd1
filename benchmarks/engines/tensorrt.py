"""TensorRT 10.x and 11.x: reads ONNX, runs as a CUDA graph."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPBackendError

from .base import Engine, Runner
from .cuda_graph import replayed
from .onnx_engines import INPUT, OUTPUT, onnx_bytes

_WORKSPACE_BYTES = 4 << 30


@dataclass(frozen=True)
class TensorRT(Engine):
    """Strongly typed: float32 or float16."""

    device: str = "cuda"
    slow_build: bool = True

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        import tensorrt

        plan = build_engine(onnx_bytes(model, example, self.dtype), self.tf32)
        engine = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.ERROR)).deserialize_cuda_engine(plan)
        context = engine.create_execution_context()
        shape = tuple(engine.get_tensor_shape(OUTPUT))
        output = torch.empty(shape, dtype=self.dtype, device=example.device)
        context.set_tensor_address(OUTPUT, output.data_ptr())

        def execute(x: Tensor) -> Tensor:
            context.set_tensor_address(INPUT, x.data_ptr())
            if not context.execute_async_v3(torch.cuda.current_stream().cuda_stream):
                raise DSPBackendError("TensorRT could not enqueue the network")
            return output

        return replayed(execute, example, self.dtype, torch.contiguous_format)


def build_engine(network: bytes, tf32: bool = False) -> bytes:
    """The serialized engine of an ONNX network.

    Raises DSPBackendError with TensorRT's message if it cannot parse or build the network.
    """
    import tensorrt

    logger = tensorrt.Logger(tensorrt.Logger.ERROR)
    builder = tensorrt.Builder(logger)
    # 10.x must be asked for a strongly typed network; 11.x knows no other kind and has dropped the flag.
    typed = getattr(tensorrt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    definition = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = tensorrt.OnnxParser(definition, logger)
    if not parser.parse(network):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise DSPBackendError(f"TensorRT cannot read the network: {errors}")
    config = builder.create_builder_config()
    config.set_memory_pool_limit(tensorrt.MemoryPoolType.WORKSPACE, _WORKSPACE_BYTES)
    if not tf32:
        config.clear_flag(tensorrt.BuilderFlag.TF32)
    plan = builder.build_serialized_network(definition, config)
    if plan is None:
        raise DSPBackendError("TensorRT could not build the network; its log on standard error says why")
    return bytes(plan)
