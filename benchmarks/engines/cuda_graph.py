"""Dense networks in half precision as a CUDA graph: PyTorch's own kernels, or cuDNN's fused convolutions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.graph.network import evaluating
from dsp_kernels.op.dense import dense_weight, live_bias
from dsp_kernels.program.steps import ConvStep, Step
from dsp_kernels.run.eager.program import EagerExecutor
from dsp_kernels.run.gpu.graphs import capture

from ..measure.floors import program_of
from .base import Engine, Runner, converted


@dataclass(frozen=True)
class CudaGraph(Engine):
    """PyTorch in channels_last, captured once and replayed: no launch overhead from Python."""

    device: str = "cuda"

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        network = converted(model, self.dtype, torch.channels_last).to(example.device)
        return replayed(network, example, self.dtype)


@dataclass(frozen=True)
class CudnnFused(Engine):
    """Batch norms folded, and cuDNN's fused convolution + bias (+ residual) + ReLU, as a CUDA graph.

    The fastest way to run a dense network in torch without compiling it.
    """

    device: str = "cuda"

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        def moved(tensor: Tensor) -> Tensor:
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            return tensor.detach().to(dtype, copy=True)

        with evaluating(model):
            program = program_of(model, example).map_tensors(moved)
        run = CudnnConvs().prepare(program)
        return replayed(lambda x: run([x])[0], example, self.dtype)


class CudnnConvs(EagerExecutor):
    """The eager executor with cuDNN's fused convolutions.

    Groups of packed convolutions become dense weights with zeros: cuDNN has no groups of unequal size.
    """

    def call(self, step: Step) -> Callable[[dict[str, Any]], Any]:
        if not isinstance(step, ConvStep) or not step.spec.structure.read:
            return super().call(step)
        spec, source, added = step.spec, step.inputs[0], step.inputs[1:]
        if spec.activation != "relu" and (spec.activation != "none" or added):
            return super().call(step)
        weight = dense_weight(spec.structure, step.weights, spec.kernel_size)
        weight = weight.contiguous(memory_format=torch.channels_last)
        bias = live_bias(spec.structure, step.bias)
        if bias is None:
            bias = weight.new_zeros(spec.structure.out_channels)
        window = spec.stride, spec.padding, spec.dilation
        if spec.activation == "none":
            return lambda values: F.conv2d(values[source], weight, bias, *window)
        if not added:
            return lambda values: torch.cudnn_convolution_relu(values[source], weight, bias, *window, 1)
        return lambda values: torch.cudnn_convolution_add_relu(
            values[source], weight, values[added[0]], 1.0, bias, *window, 1
        )


def replayed(
    network: Runner,
    example: Tensor,
    dtype: torch.dtype,
    layout: torch.memory_format = torch.channels_last,
) -> Runner:
    """Captured on the example's shape; input and output are copied outside the graph."""
    static_input = example.to(dtype).contiguous(memory_format=layout).clone()
    outputs: list[Tensor] = []

    def launch() -> None:
        with torch.no_grad():
            outputs[:] = [network(static_input)]

    replay = capture(launch, example.device, None)
    if replay is None:
        raise DSPBackendError("the network cannot be captured in a CUDA graph")

    def run(x: Tensor) -> Tensor:
        static_input.copy_(x)
        replay()
        return outputs[0].float()

    run.network = network  # type: ignore[attr-defined]  # the graph reads its weights
    return run
