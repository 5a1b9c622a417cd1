"""The derivative of the op: each group's convolution backwards, gathered and scattered the same way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsp_kernels.activations import activation_gradient
from dsp_kernels.schema import NAMESPACE

__all__ = ["backward", "save_context"]

# Activations whose derivative can be read from their output, which is at hand.
_FROM_OUTPUT = ("none", "relu", "relu6")


def save_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Keep what ``backward`` needs; for an activation that hides its input, the op's own arguments."""
    x, weights, in_index, out_index, bias, residual, out_channels, *settings, activation = inputs
    ctx.groups = len(weights)
    ctx.out_channels, ctx.settings, ctx.activation = out_channels, settings, activation
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    # Only what the derivative needs: the caller may overwrite the rest.
    before = (None, None, output) if activation in ("relu", "relu6") else (None, None, None)
    if activation not in _FROM_OUTPUT:
        before = (bias, residual, None)
    ctx.save_for_backward(x, *before, *weights, *in_index, *out_index)


def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of x, weights, bias and residual; None for the indices and settings."""
    x, bias, residual, output, *rest = ctx.saved_tensors
    n = ctx.groups
    weights, in_index, out_index = rest[:n], rest[n : 2 * n], rest[2 * n :]
    _, stride, padding, dilation = ctx.settings
    if ctx.activation != "none":
        before = output
        if ctx.activation not in _FROM_OUTPUT:
            op = getattr(torch.ops, NAMESPACE).gather_grouped_conv2d
            before = op(
                x, weights, in_index, out_index, bias, residual, ctx.out_channels, *ctx.settings, "none"
            )
        slope = activation_gradient(before, ctx.activation)
        # Not a product where the slope is 0: an infinite gradient stays out.
        grad = torch.where(slope != 0, grad * slope, 0.0)

    needs_x, needs_weights = ctx.needs_input_grad[0], any(weight.requires_grad for weight in weights)
    grad_x = torch.zeros_like(x) if needs_x else None
    grad_weights: list[Tensor | None] = []
    grad_bias = grad.new_zeros(ctx.out_channels) if ctx.has_bias else None
    for weight, index, out in zip(weights, in_index, out_index, strict=True):
        group_grad = grad.index_select(1, out)
        if grad_bias is not None:
            grad_bias = grad_bias.index_add(0, out, group_grad.sum((0, 2, 3)))
        if weight.shape[1] == 0:
            grad_weights.append(torch.zeros_like(weight))
            continue
        gathered = x.index_select(1, index)
        group_grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            group_grad,
            gathered,
            weight,
            None,
            list(stride),
            list(padding),
            list(dilation),
            False,
            [0, 0],
            1,
            [needs_x, needs_weights, False],
        )
        grad_weights.append(grad_weight)
        if grad_x is not None:
            grad_x = grad_x.index_add(1, index, group_grad_x)
    nothing = [None] * n
    grad_residual = grad if ctx.has_residual else None
    return (grad_x, grad_weights, nothing, nothing, grad_bias, grad_residual, *[None] * 6)
