"""The op: Python function, torch op with fake kernel and autograd, and the caches behind it.

A structure object cannot be an argument of a torch op, so the torch op takes the structure as index tensors.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from dsp_kernels.errors import DSPError, DSPShapeError, DSPStructureError
from dsp_kernels.op.activations import activation_gradient
from dsp_kernels.op.dense import Indices, index_tensors
from dsp_kernels.op.spec import ConvSpec, memory_format_of
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.run.convs import BACKENDS, ConvPlan, first_working
from dsp_kernels.run.cpu.conv import CpuPlan
from dsp_kernels.run.cpu.extension import chosen_isa, may_use_winograd
from dsp_kernels.run.gpu.conv import warn_of_missing
from dsp_kernels.run.lru import LRU

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
    """Gather, all groups, bias, residual, activation and scatter of a pruned, grouped convolution.

    x: (batch, in_channels, height, width), floating point, contiguous or channels_last.
    weights: one (O_g, C_g, kh, kw) per group of ``structure``; bias: (out_channels,) or None;
    residual: of the output's shape, or None. All of one dtype and device.
    kernel_size: taken from the weights; required only if there are none. All sizes are in pixels.
    activation: none, relu, relu6, silu or hardswish.

    For every group g: y[:, out_g] = act(conv(x[:, in_g], W_g) + bias[out_g] (+ residual[:, out_g])).
    Absent channels are act(residual), or act(0). The output has x's dtype and memory format.

    Differentiable in x, weights, bias and residual. Raises DSPShapeError if the arguments do not match.

    On a GPU the weights are arranged once, and again when PyTorch counts a change of them: after a write
    through ``.data`` call ``torch.autograd.graph.increment_version(weight)``.

    >>> structure = GroupStructure.build(3, 2, [([0, 2], [1])])
    >>> y = gather_grouped_conv2d(torch.ones(1, 3, 4, 4), [torch.ones(1, 2, 3, 3)], structure, padding=1)
    >>> y.shape, y[0, :, 1, 1]
    (torch.Size([1, 2, 4, 4]), tensor([ 0., 18.]))
    """
    if kernel_size is None:
        if not weights:
            raise DSPShapeError("kernel_size cannot be read from no weights; pass kernel_size=")
        kernel_size = tuple(weights[0].shape[2:])
    settings: Any = kernel_size, stride, padding, dilation, activation
    spec = ConvSpec(structure, *settings)
    spec.check_input(x, (), residual)
    # Under a mode that makes other tensors (fake ones), index tensors are fake too and must not be cached.
    indices = (_cached_index if type(x) is Tensor else _new_index)(structure, x.device)
    lists = list(weights), *map(list, indices)
    return call_op(x, *lists, bias, residual, structure.out_channels, *spec.settings)


def call_op(*arguments: Any) -> Tensor:
    """OP, which has no forward-mode derivative. Raises DSPError instead of giving tangents of zero."""
    if forward_ad._current_level >= 0:
        for tensor in pytree.tree_leaves(arguments):
            if isinstance(tensor, Tensor) and forward_ad.unpack_dual(tensor).tangent is not None:
                raise DSPError(
                    f"{OP_NAME} has no forward-mode derivative (torch.func.jvp, jacfwd); use backward(), or "
                    "the packed model instead of the swapped one"
                )
    return OP(*arguments)


def _new_index(structure: GroupStructure, device: torch.device) -> Indices:
    with torch.inference_mode(False):
        return index_tensors(structure, device)


_index_by_structure = lru_cache(maxsize=1024)(_new_index)


def _cached_index(structure: GroupStructure, device: torch.device) -> Indices:
    return _index_by_structure(structure, device)


# What torch.compiler.assume_constant_result sets; calling that would import all of dynamo.
_cached_index._dynamo_marked_constant = True  # type: ignore[attr-defined]


# -- the torch op: kernel, fake kernel, autograd. settings: kernel_size, stride, padding, dilation, activation

Tensors = list[Tensor]


def _run(x: Tensor, weights: Tensors, in_index: Tensors, out_index: Tensors, *others: Any) -> Tensor:
    """Everything is checked again, because an exported graph calls the torch op directly."""
    bias, residual, out_channels, *settings = others
    if x.dim() != 4:
        raise DSPShapeError(f"x has shape {tuple(x.shape)}; expected (batch, channels, height, width)")
    spec = ConvSpec(_structure(in_index, out_index, x.shape[1], out_channels), *settings)
    spec.check_constants(weights, bias)
    spec.check_input(x, [*weights, *([] if bias is None else [bias])], residual)
    layout = memory_format_of(x)
    return _plan_for(spec, weights, bias, x, layout)(x, residual).contiguous(memory_format=layout)


def _fake(x: Tensor, weights: Tensors, in_index: Tensors, out_index: Tensors, *others: Any) -> Tensor:
    """Shape, dtype and strides of the output. Index values are unknown here; ``_run`` checks them."""
    bias, _residual, out_channels, *settings = others
    if not len(weights) == len(in_index) == len(out_index):
        raise DSPStructureError(
            f"{len(weights)} weights, {len(in_index)} in_index and {len(out_index)} out_index lists; "
            "expected one of each per group"
        )
    for constant in (*weights, *(() if bias is None else (bias,))):
        if constant.device != x.device:
            raise DSPShapeError(
                f"x is on {x.device}, but a weight or bias is on {constant.device}; they must match"
            )
    # The output's size does not depend on the channels.
    height, width = ConvSpec(GroupStructure(1, 1), *settings).output_hw((x.shape[2], x.shape[3]))
    y = x.new_empty(x.shape[0], out_channels, height, width)
    return y.contiguous(memory_format=memory_format_of(x))


# Activations whose derivative follows from their output, or is 1.
_FROM_OUTPUT = ("none", "relu", "relu6")


def _save_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weights, in_index, out_index, bias, residual, ctx.out_channels, *ctx.settings, ctx.activation = inputs
    ctx.groups = len(weights)
    ctx.has_bias, ctx.has_residual = bias is not None, residual is not None
    # Only what the derivative needs: the caller may overwrite the rest.
    if ctx.activation in _FROM_OUTPUT:
        saved = None, None, None if ctx.activation == "none" else output
    else:
        saved = bias, residual, None
    ctx.save_for_backward(x, *saved, *weights, *in_index, *out_index)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Gradients of x, weights, bias and residual; None for indices and settings."""
    x, bias, residual, before, *rest = ctx.saved_tensors
    n = ctx.groups
    weights, in_index, out_index = rest[:n], rest[n : 2 * n], rest[2 * n :]
    if ctx.activation != "none":
        if ctx.activation not in _FROM_OUTPUT:
            indices = in_index, out_index
            before = OP(x, weights, *indices, bias, residual, ctx.out_channels, *ctx.settings, "none")
        slope = activation_gradient(before, ctx.activation)
        # Not a plain product: an infinite gradient times a slope of 0 would be NaN.
        grad = torch.where(slope != 0, grad * slope, 0.0)

    needs_x, needs_weights = ctx.needs_input_grad[0], any(weight.requires_grad for weight in weights)
    grad_x = torch.zeros_like(x) if needs_x else None
    grad_weights: list[Tensor | None] = []
    grad_bias = grad.new_zeros(ctx.out_channels) if ctx.has_bias else None
    _, stride, padding, dilation = map(list, ctx.settings)
    for weight, columns, rows in zip(weights, in_index, out_index, strict=True):
        group_grad = grad.index_select(1, rows)
        if grad_bias is not None:
            grad_bias = grad_bias.index_add(0, rows, group_grad.sum((0, 2, 3)))
        if weight.shape[1] == 0:
            grad_weights.append(torch.zeros_like(weight))
            continue
        settings = stride, padding, dilation, False, [0, 0], 1  # not transposed, no output padding, one group
        group_grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            group_grad, x.index_select(1, columns), weight, None, *settings, [needs_x, needs_weights, False]
        )
        grad_weights.append(grad_weight)
        if grad_x is not None:
            grad_x = grad_x.index_add(1, columns, group_grad_x)
    nothing = [None] * n
    grad_residual = grad if ctx.has_residual else None
    return (grad_x, grad_weights, nothing, nothing, grad_bias, grad_residual, *[None] * 6)


_NAME = f"{NAMESPACE}::{OP_NAME}"
torch.library.define(_NAME, SCHEMA)
torch.library.impl(_NAME, "default", _run)
torch.library.register_fake(_NAME, _fake)
torch.library.register_autograd(_NAME, _backward, setup_context=_save_context)
OP = torch.ops.dsp_kernels.gather_grouped_conv2d


# -- caches: index tensors -> checked structure; weights -> CPU plan with packed weights

# An entry is valid while the same storages live and do not change; version counters are in the key. Not the
# tensors: under torch.compile they may be others at every call. While a storage has a weak reference, no
# other gets its number.
_STRUCTURES: LRU[tuple[list[StorageWeakRef], GroupStructure]] = LRU(1024)


def _structure(in_index: Tensors, out_index: Tensors, in_channels: int, out_channels: int) -> GroupStructure:
    """in_index[g], out_index[g]: 1-D int32 or int64 tensors on any device. Raises DSPStructureError."""
    if len(in_index) != len(out_index):
        raise DSPStructureError(f"{len(in_index)} in_index lists but {len(out_index)} out_index lists")
    tensors = (*in_index, *out_index)
    if any(tensor.is_inference() for tensor in tensors):  # without a version counter, changes go unnoticed
        return _check(in_index, out_index, in_channels, out_channels)
    storages = [tensor.untyped_storage() for tensor in tensors]
    views = ((tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()) for tensor in tensors)
    key = (in_channels, out_channels, *(storage._cdata for storage in storages), *views)
    entry = _STRUCTURES.get(key)
    if entry is None:
        entry = [*map(StorageWeakRef, storages)], _check(in_index, out_index, in_channels, out_channels)
        _STRUCTURES.put(key, entry)
    return entry[1]


def _check(in_index: Tensors, out_index: Tensors, in_channels: int, out_channels: int) -> GroupStructure:
    for name, index in (("in_index", in_index), ("out_index", out_index)):
        for number, tensor in enumerate(index):
            if tensor.dim() != 1 or tensor.dtype not in (torch.int32, torch.int64):
                raise DSPStructureError(
                    f"{name} of group {number} is a {tensor.dim()}-D tensor of {tensor.dtype}; "
                    "expected one dimension of int32 or int64"
                )
    pairs = [(i.tolist(), o.tolist()) for i, o in zip(in_index, out_index, strict=True)]
    return GroupStructure.build(in_channels, out_channels, pairs)


# Comparing a plan with the weights costs far less than packing them again. Batch 1, 2 threads, us per call
# that packs / compares / has the plan: ResNet-50 80 % layer4.0.conv2 (2.4 MB) 1583 / 512 / 407, of which 53
# compare; layer4.1.conv1 (0.5 MB) 399 / 214 / 129; a ResNet-56 layer (3 KB) 115 / 82 / 19 (2 shared Zen 5
# cores). Sizes are bytes of weights; a plan holds them twice.
PLANS: LRU[CpuPlan] = LRU(128, size_of=lambda plan: plan.weight_bytes, max_size=64 << 20)


def _plan_for(
    spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None, x: Tensor, layout: torch.memory_format
) -> ConvPlan:
    """A plan that runs ``spec`` on x. On the CPU a cached one must have equal weights and bias, bit for bit.

    Address and version counter do not suffice: writes through ``weight.data`` or numpy are not counted.
    """
    request = "auto", spec, x.dtype, x.device, layout
    backend = BACKENDS.choose(*request)
    if x.device.type == "cuda":
        warn_of_missing(x.device)
    if backend.name != "cpu":
        return first_working(BACKENDS.candidates(*request), spec, weights, bias)
    addresses = (tensor.data_ptr() for tensor in (*weights, bias) if tensor is not None)
    key = (chosen_isa(), may_use_winograd(), bias is None, spec.kernel_size, *addresses)
    plan = PLANS.get(key)
    if plan is None or plan.spec != spec or not plan.holds(weights, bias):
        made = backend.prepare(spec, weights, bias)
        assert isinstance(made, CpuPlan)
        plan = made
        PLANS.put(key, plan)
    return plan
