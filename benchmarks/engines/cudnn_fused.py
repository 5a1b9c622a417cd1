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

from dsp_kernels.executors.eager import EagerExecutor
from dsp_kernels.planner import plan
from dsp_kernels.program import ConvStep, Program
from dsp_kernels.trace import evaluating, trace

from .base import Runner, cuda_available
from .cuda_graph import capture

__all__ = ["CudnnFused", "with_fused_convs"]


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
        network = with_fused_convs(program)
        static_input = example.to(self.dtype).contiguous(memory_format=torch.channels_last).clone()
        graph, static_output = capture(lambda: network(static_input))

        def run(x: Tensor) -> Tensor:
            static_input.copy_(x)
            graph.replay()
            return static_output.float()

        return run


def with_fused_convs(program: Program) -> Callable[[Tensor], Tensor]:
    """x: (batch, channels, height, width), channels_last -> the network's answer.

    Steps that are no convolution run in plain PyTorch.
    """
    eager = EagerExecutor()
    calls = [_conv(step) if isinstance(step, ConvStep) else eager.call(step) for step in program.steps]

    def run(x: Tensor) -> Tensor:
        values: dict[str, Any] = {program.input: x}
        for step, call, dead in zip(program.steps, calls, program.dying, strict=True):
            values[step.output] = call(values)
            for name in dead:
                values.pop(name, None)
        answer: Tensor = values[program.output]
        return answer

    return run


def _conv(step: ConvStep) -> Callable[[dict[str, Any]], Tensor]:
    spec, source = step.spec, step.inputs[0]
    weight, bias = _dense(step)
    place = spec.stride, spec.padding, spec.dilation
    added = step.inputs[1:]
    if spec.activation == "relu" and not added:
        return lambda values: torch.cudnn_convolution_relu(values[source], weight, bias, *place, 1)
    if spec.activation == "relu":
        return lambda values: torch.cudnn_convolution_add_relu(
            values[source], weight, values[added[0]], 1.0, bias, *place, 1
        )
    if spec.activation == "none" and not added:
        return lambda values: F.conv2d(values[source], weight, bias, *place)
    return EagerExecutor().call(step)


def _dense(step: ConvStep) -> tuple[Tensor, Tensor]:
    """weight: (out_channels, in_channels, kh, kw), zeros where no kernel is; bias: (out_channels,)."""
    structure = step.spec.structure
    like = step.weights[0]
    weight = like.new_zeros(structure.out_channels, structure.in_channels, *step.spec.kernel_size)
    for group, part in zip(structure.groups, step.weights, strict=True):
        rows = torch.tensor(group.out_index, dtype=torch.long)
        weight[rows[:, None], torch.tensor(group.in_index, dtype=torch.long)[None, :]] = part
    bias = like.new_zeros(structure.out_channels) if step.bias is None else step.bias.clone()
    bias[list(structure.absent)] = 0
    return weight.contiguous(memory_format=torch.channels_last), bias
