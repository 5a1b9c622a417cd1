"""The one operation as a Python function and as a torch op with a fake kernel and autograd."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from dsp_kernels.errors import DSPShapeError, DSPStructureError
from dsp_kernels.op.activations import activation_gradient
from dsp_kernels.op.packed import pair
from dsp_kernels.op.spec import ConvSpec, memory_format_of
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.run.convs import BACKENDS, ConvPlan
from dsp_kernels.run.cpu.conv import CpuPlan
from dsp_kernels.run.cpu.extension import chosen_isa, may_use_winograd

__all__ = [
    "NAMESPACE",
    "OP_NAME",
    "SCHEMA",
    "backward",
    "forget",
    "gather_grouped_conv2d",
    "gather_grouped_conv2d_tensors",
    "index_tensors",
    "kept",
    "plan_for",
    "save_context",
    "structure_of",
]

NAMESPACE = "dsp_kernels"
OP_NAME = "gather_grouped_conv2d"
SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor[] in_index, Tensor[] out_index, Tensor? bias, Tensor? residual, "
    "SymInt out_channels, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "str activation) -> Tensor"
)


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
    torch.library.define(name, SCHEMA)
    torch.library.impl(name, "default", _run)
    torch.library.register_fake(name, _fake)
    torch.library.register_autograd(name, backward, setup_context=save_context)


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


_LIMIT = 1024
_structures_lock = Lock()
# An entry is good while the very same tensors live, unchanged (their version counters are in the key).
_checked: OrderedDict[tuple[int, ...], tuple[tuple[TensorWeakRef, ...], GroupStructure]] = OrderedDict()


def structure_of(
    in_index: Sequence[Tensor], out_index: Sequence[Tensor], in_channels: int, out_channels: int
) -> GroupStructure:
    """in_index[g], out_index[g]: 1-D int32 or int64 tensors on any device. The structure that they describe.

    Raises DSPStructureError for anything that is not a valid structure.
    """
    if len(in_index) != len(out_index):
        raise DSPStructureError(f"{len(in_index)} in_index lists but {len(out_index)} out_index lists")
    tensors = (*in_index, *out_index)
    if any(tensor.is_inference() for tensor in tensors):  # no version counter: cannot be remembered safely
        return _check(in_index, out_index, in_channels, out_channels)
    key = (in_channels, out_channels, *(id(t) for t in tensors), *(t._version for t in tensors))
    with _structures_lock:
        entry = _checked.get(key)
        if entry is not None and all(ref() is t for ref, t in zip(entry[0], tensors, strict=True)):
            _checked.move_to_end(key)
            return entry[1]
    structure = _check(in_index, out_index, in_channels, out_channels)
    with _structures_lock:
        _checked[key] = (tuple(TensorWeakRef(t) for t in tensors), structure)
        while len(_checked) > _LIMIT:
            _checked.popitem(last=False)
    return structure


def _check(
    in_index: Sequence[Tensor], out_index: Sequence[Tensor], in_channels: int, out_channels: int
) -> GroupStructure:
    for name, index in (("in_index", in_index), ("out_index", out_index)):
        for number, tensor in enumerate(index):
            if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
                raise DSPStructureError(
                    f"{name} of group {number} is a {tensor.dim()}-D tensor of {tensor.dtype}; "
                    "expected one dimension of int32 or int64"
                )
    pairs = [(i.tolist(), o.tolist()) for i, o in zip(in_index, out_index, strict=True)]
    return GroupStructure.build(in_channels, out_channels, pairs)


# Checking a kept plan costs far less than packing. Batch 1, 2 threads, packed anew / kept / the plan alone:
# ResNet-50 80 % layer4.0.conv2 (2.4 MB) 1583 / 512 / 407 us, the check 53 us of it; layer4.1.conv1 (0.5 MB)
# 399 / 214 / 129 us; a ResNet-56 layer (3 KB) 115 / 82 / 19 us (2 Zen 5 cores, shared with others).
_MOST_PLANS = 128
_MOST_BYTES = 64 << 20  # of weights; a plan holds them twice
_plans_lock = Lock()
_plans: OrderedDict[tuple[object, ...], CpuPlan] = OrderedDict()


def plan_for(
    spec: ConvSpec,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    x: Tensor,
    layout: torch.memory_format,
) -> ConvPlan:
    """weights[g]: (O_g, C_g, kh, kw); bias: (out_channels,) or None; x: the input. The plan to run it.

    A kept plan is taken only if the numbers in it equal the weights and the bias bit for bit. An address or
    a version counter would not do: ``weight.data`` and numpy write without counting.
    """
    backend = BACKENDS.choose("auto", spec, x.dtype, x.device, layout)
    if backend.name != "cpu":
        return backend.prepare(spec, weights, bias)
    constants = [*weights, *([] if bias is None else [bias])]
    how = chosen_isa(), may_use_winograd(), bias is None, spec.kernel_size
    key = (*how, *(constant.data_ptr() for constant in constants))
    with _plans_lock:
        plan = _plans.get(key)
    if plan is None or plan.spec != spec or not plan.holds(weights, bias):
        made = backend.prepare(spec, weights, bias)
        assert isinstance(made, CpuPlan)
        plan = made
    with _plans_lock:
        _plans[key] = plan
        _plans.move_to_end(key)
        while len(_plans) > _MOST_PLANS or sum(plan.weight_bytes for plan in _plans.values()) > _MOST_BYTES:
            _plans.popitem(last=False)
    return plan


def kept() -> tuple[int, int]:
    """How many plans are kept, and the bytes of their weights."""
    with _plans_lock:
        return len(_plans), sum(plan.weight_bytes for plan in _plans.values())


def forget() -> None:
    """Let go of all kept plans."""
    with _plans_lock:
        _plans.clear()


_register()
