"""The one operation as a Python function and as a torch op with a fake kernel and autograd."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dsp_kernels.conv_spec import ConvSpec, memory_format_of
from dsp_kernels.errors import DSPShapeError, DSPStructureError
from dsp_kernels.native import native
from dsp_kernels.ops_autograd import backward, save_context
from dsp_kernels.packed import pair
from dsp_kernels.plan_cache import plan_for
from dsp_kernels.schema import NAMESPACE, OP_NAME, SCHEMA
from dsp_kernels.structure import GroupStructure
from dsp_kernels.structure_cache import structure_of

__all__ = ["gather_grouped_conv2d", "gather_grouped_conv2d_tensors", "index_tensors"]


def gather_grouped_conv2d(
    x: Tensor,
    weights: Sequence[Tensor],
    structure: GroupStructure,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    kernel_size: int | Sequence[int] | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    activation: str = "none",
) -> Tensor:
    """Gather, all groups, bias, residual, activation and scatter of a multi-branch convolution.

    x: (batch, in_channels, height, width), floating, plain or channels_last.
    weights: one (O_g, C_g, kh, kw) per group of ``structure``; bias: (out_channels,) or None;
    residual: like the output, or None. All of one dtype and device.
    kernel_size: read from the weights; to be given where the structure has no groups.
    activation: none, relu, relu6, silu or hardswish.

    For every group g: y[:, out_g] = act(conv(x[:, in_g], W_g) + bias[out_g] (+ residual[:, out_g])).
    Absent channels hold act(residual), or act(0). The output has x's dtype and layout.

    Differentiable in x, weights, bias and residual. Raises DSPShapeError if the arguments do not fit.
    """
    if kernel_size is None:
        if not weights:
            raise DSPShapeError("kernel_size cannot be read from no weights; pass kernel_size=")
        kernel_size = (weights[0].shape[2], weights[0].shape[3])
    spec = ConvSpec(
        structure,
        pair(kernel_size, "kernel_size", 1),
        pair(stride, "stride", 1),
        pair(padding, "padding", 0),
        pair(dilation, "dilation", 1),
        activation,
    )
    spec.check_input(x, (), residual)
    # Under a mode that makes other tensors (fake ones) the index tensors are made by it too, and not kept.
    indices = index_tensors if type(x) is Tensor else _make_index_tensors
    in_index, out_index = indices(structure, x.device)
    return gather_grouped_conv2d_tensors(x, weights, in_index, out_index, bias, residual, spec)


def gather_grouped_conv2d_tensors(
    x: Tensor,
    weights: Sequence[Tensor],
    in_index: Sequence[Tensor],
    out_index: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    spec: ConvSpec,
) -> Tensor:
    """The same through the torch op, for a caller that keeps the structure's indices as tensors."""
    return getattr(torch.ops, NAMESPACE).gather_grouped_conv2d(
        x,
        list(weights),
        list(in_index),
        list(out_index),
        bias,
        residual,
        spec.structure.out_channels,
        spec.kernel_size,
        spec.stride,
        spec.padding,
        spec.dilation,
        spec.activation,
    )


def index_tensors(
    structure: GroupStructure, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """in_index and out_index of every group as int64 tensors on a device, made once per structure."""
    return _kept_index_tensors(structure, device)


# What torch.compiler.assume_constant_result sets, without importing all of dynamo to set it.
index_tensors._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _make_index_tensors(
    structure: GroupStructure, device: torch.device
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    with torch.inference_mode(False):
        return (
            tuple(torch.tensor(g.in_index, dtype=torch.long, device=device) for g in structure.groups),
            tuple(torch.tensor(g.out_index, dtype=torch.long, device=device) for g in structure.groups),
        )


_kept_index_tensors = lru_cache(maxsize=1024)(_make_index_tensors)


def _run(
    x: Tensor,
    weights: list[Tensor],
    in_index: list[Tensor],
    out_index: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """The op on real tensors: everything is checked again, because an exported graph comes here directly."""
    if x.dim() != 4:
        raise DSPShapeError(f"x has shape {tuple(x.shape)}; expected (batch, channels, height, width)")
    structure = structure_of(in_index, out_index, x.shape[1], out_channels)
    spec = ConvSpec(structure, _two(kernel_size), _two(stride), _two(padding), _two(dilation), activation)
    spec.check_constants(weights, bias)
    shape = spec.check_input(x, [*weights, *([] if bias is None else [bias])], residual)
    layout = memory_format_of(x)
    if shape[0] == 0:
        return x.new_empty(shape).contiguous(memory_format=layout)
    y = plan_for(spec, weights, bias, x, layout)(x, residual)
    return y.contiguous(memory_format=layout)


def _fake(
    x: Tensor,
    weights: list[Tensor],
    in_index: list[Tensor],
    out_index: list[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
) -> Tensor:
    """Shape, dtype and strides of the op's output. Index values are unknown here; ``_run`` checks them."""
    if not len(weights) == len(in_index) == len(out_index):
        raise DSPStructureError(
            f"{len(weights)} weights, {len(in_index)} in_index and {len(out_index)} out_index lists; "
            "expected one of each per group"
        )
    for constant in (*weights, *(() if bias is None else (bias,))):
        if constant.device != x.device:
            raise DSPShapeError(
                f"x is on {x.device}, but a weight or bias is on {constant.device}; they have to agree"
            )
    shapeless = ConvSpec(
        GroupStructure(x.shape[1], 1),
        _two(kernel_size),
        _two(stride),
        _two(padding),
        _two(dilation),
        activation,
    )
    height, width = shapeless.output_hw((x.shape[2], x.shape[3]))
    y = x.new_empty(x.shape[0], out_channels, height, width)
    return y.contiguous(memory_format=memory_format_of(x))


def _two(values: Sequence[int]) -> tuple[int, int]:
    return pair(list(values), "a setting of the convolution", 0)


def _register() -> None:
    name = f"{NAMESPACE}::{OP_NAME}"
    # The native extension brings the same schema with it, when it was built where torch is.
    if native() is None or not hasattr(getattr(torch.ops, NAMESPACE), OP_NAME):
        torch.library.define(name, SCHEMA)
    torch.library.impl(name, "default", _run)
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, backward, setup_context=save_context)


_register()
