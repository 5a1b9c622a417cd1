"""cuDNN's own fused operations, conv + bias (+ residual) + ReLU in one call, captured in a CUDA graph.

The strongest way to run a dense network in torch without compiling it: norms are folded, and what ends in a
ReLU is one cuDNN kernel. Convolutions of groups get their zeros in place: cuDNN has no unequal groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels.graph.network import evaluating, trace
from dsp_kernels.op.dense import dense_weight, live_bias
from dsp_kernels.program.planner import plan
from dsp_kernels.program.steps import ConvStep, Step
from dsp_kernels.run.eager.program import EagerExecutor

from .base import Runner, cuda_available
from .cuda_graph import replayed

__all__ = ["CudnnConvs", "CudnnFused"]


@dataclass(frozen=True)
class CudnnFused:
    """dtype: of weights and activations; channels_last, in which tensor cores read them directly."""

    name: str = "cudnn-fused-fp16"
    dtype: torch.dtype = torch.float16
    device: str = "cuda"
    slow_build: bool = False
    any_batch: bool = False

    def available(self) -> tuple[bool, str]:
        """Where torch finds a CUDA device."""
        return cuda_available()

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """Captures the network on the example's shape; input and output are copied outside the graph."""
        with evaluating(model):
            program = plan(trace(model, example)).map_tensors(
                lambda t: (
                    t.detach().to(self.dtype, copy=True) if t.is_floating_point() else t.detach().clone()
                )
            )
        return replayed(CudnnConvs().prepare(program), example, self.dtype, torch.channels_last)


class CudnnConvs(EagerExecutor):
    """The eager executor with convolutions by cuDNN's fused operations where there is one."""

    def call(self, step: Step) -> Callable[[dict[str, Any]], Any]:
        return _conv(step) if isinstance(step, ConvStep) else super().call(step)


def _conv(step: ConvStep) -> Callable[[dict[str, Any]], Tensor]:
    spec, source = step.spec, step.inputs[0]
    if not spec.structure.read:
        return EagerExecutor().call(step)
    added = step.inputs[1:]
    if spec.activation != "relu" and (spec.activation != "none" or added):
        return EagerExecutor().call(step)
    weight = dense_weight(spec.structure, step.weights, spec.kernel_size)
    weight = weight.contiguous(memory_format=torch.channels_last)
    bias = live_bias(spec.structure, step.bias)
    if bias is None:
        bias = weight.new_zeros(spec.structure.out_channels)
    place = spec.stride, spec.padding, spec.dilation
    if spec.activation == "none":
        return lambda values: F.conv2d(values[source], weight, bias, *place)
    if not added:
        return lambda values: torch.cudnn_convolution_relu(values[source], weight, bias, *place, 1)
    return lambda values: torch.cudnn_convolution_add_relu(
        values[source], weight, values[added[0]], 1.0, bias, *place, 1
    )
