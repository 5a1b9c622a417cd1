"""The definition of integer networks, in plain PyTorch. The native kernels equal it to the bit.

An integer value q stands for the real number scale * q: 0..255 (u8) where it is never negative, otherwise
-128..127 (s8), or more levels for what only a few products are summed of ("exact", see Requantize). Tensors
hold the integers as float32. A layer's sum of products is exact: here it is computed in float64. All other
arithmetic is float32, each operation rounded once, none fused with another; rounding is half to even.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_kernels.op.activations import activate
from dsp_kernels.program import steps
from dsp_kernels.program.steps import Requantize, Step
from dsp_kernels.run.eager.conv import FORMS, form_of

Call = Callable[[Mapping[str, Any]], Tensor]


def computes_in_integers(step: Step) -> bool:
    """Whether ``integer_call`` runs the step. Steps that only move values are the same for integers."""
    converts = isinstance(step, steps.QuantizeStep | steps.DequantizeStep)
    return converts or getattr(step, "requantize", None) is not None


def integer_call(step: Step) -> Call:
    """A function from the values computed so far to the result of a step of integers."""
    x = step.inputs[0]
    if isinstance(step, steps.QuantizeStep):
        return lambda values: (values[x] * step.inverse).round_().clamp_(step.low, step.high)
    if isinstance(step, steps.DequantizeStep):
        return lambda values: values[x] * step.scale
    made: Any = step
    return _CALLS[type(step)](made, made.requantize)


def _finished(t: Tensor, requantize: Requantize, activation: str) -> Tensor:
    if math.isinf(requantize.high):
        return activate(t, activation)
    return t.clamp_(requantize.low, requantize.high).round_()


def _conv(step: steps.ConvStep, requantize: Requantize) -> Call:
    weights = [weight.double() for weight in step.weights]
    convolve = FORMS[form_of(step.spec)](step.spec, weights, None)
    multiplier = requantize.multiplier.view(-1, 1, 1)
    bias = None if step.bias is None else step.bias.view(-1, 1, 1)
    x, residual = step.inputs[0], step.inputs[1] if len(step.inputs) == 2 else None

    def call(values: Mapping[str, Any]) -> Tensor:
        t = convolve(values[x].double()).float().mul_(multiplier)
        if bias is not None:
            t.add_(bias)
        if residual is not None:
            assert requantize.residual is not None
            t.add_(values[residual] * requantize.residual)
        return _finished(t, requantize, step.spec.activation)

    return call


def _linear(step: steps.LinearStep, requantize: Requantize) -> Call:
    weight, x = step.weight.double(), step.inputs[0]

    def call(values: Mapping[str, Any]) -> Tensor:
        t = F.linear(values[x].double(), weight).float().mul_(requantize.multiplier)
        return _finished(t if step.bias is None else t.add_(step.bias), requantize, step.activation)

    return call


def _elementwise(step: steps.ElementwiseStep, requantize: Requantize) -> Call:
    x, y, multiplier = step.inputs[0], step.inputs[-1], requantize.multiplier

    def call(values: Mapping[str, Any]) -> Tensor:
        if step.kind == "multiply":
            t = (values[x] * values[y]).mul_(multiplier)
        else:
            assert requantize.residual is not None
            t = (values[x] * multiplier).add_(values[y] * requantize.residual)
        return _finished(t, requantize, step.activation)

    return call


def _average(step: steps.PoolStep | steps.GlobalPoolStep, requantize: Requantize) -> Call:
    """``dsp_kernels.quantizing.choose`` takes only pools whose averages are of equal numbers of pixels."""
    x = step.inputs[0]
    windows = isinstance(step, steps.PoolStep) and step.kind == "avg_pool"
    keepdim = isinstance(step, steps.PoolStep) or step.keepdim

    def call(values: Mapping[str, Any]) -> Tensor:
        taken = values[x].double()
        if windows:
            assert isinstance(step, steps.PoolStep)
            sums = F.avg_pool2d(taken, **{**step.settings, "divisor_override": 1})
            height, width = step.settings["kernel_size"]
            pixels = step.settings.get("divisor_override") or height * width
        else:
            sums, pixels = taken.sum((2, 3), keepdim=keepdim), taken.shape[2] * taken.shape[3]
        factor = requantize.multiplier / torch.full_like(requantize.multiplier, pixels)
        return _finished(sums.float().mul_(factor), requantize, "none")

    return call


_CALLS: dict[type[Step], Callable[..., Call]] = {
    steps.ConvStep: _conv,
    steps.LinearStep: _linear,
    steps.ElementwiseStep: _elementwise,
    steps.PoolStep: _average,
    steps.GlobalPoolStep: _average,
}
