"""What each operation of a traced network does to the values of a ``Walk``."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels.errors import DSPFormatError
from dsp_pruning.torchscript_archive import State
from dsp_pruning.torchscript_walk import NORM, Branch, Gathered, Image, Owner, Scatter, Walk, copy_state

__all__ = ["HANDLERS"]


def _attribute(walk: Walk, operands: list[Any]) -> Any:
    owner, name = operands
    if not isinstance(owner, Owner):
        raise DSPFormatError(f"attribute {name!r} of something that is no module")
    path = f"{owner.path}.{name}" if owner.path else name
    return State(path, walk.state[path]) if path in walk.state else Owner(path)


def _index(value: Any, what: str) -> tuple[int, ...]:
    tensor = value.tensor if isinstance(value, State) else value
    if (
        not isinstance(tensor, Tensor)
        or tensor.is_floating_point()
        or tensor.numel() != max(tensor.shape, default=0)
    ):
        raise DSPFormatError(f"{what} is no list of channels")
    return tuple(tensor.flatten().tolist())


def _gather(walk: Walk, operands: list[Any]) -> Gathered:
    tensors = [o for o in operands if isinstance(o, Tensor | State)]
    if len(tensors) != 1 or 1 not in [o for o in operands if isinstance(o, int) and not isinstance(o, bool)]:
        raise DSPFormatError("channels are gathered in an unknown way")
    return Gathered(walk.image(operands[0]), _index(tensors[0], "an index to gather"))


def _convolution(walk: Walk, operands: list[Any]) -> Any:
    value, weight, bias, stride, padding, dilation = operands[:6]
    groups = operands[8] if len(operands) > 8 else (operands[6] if len(operands) > 6 else 1)
    transposed = len(operands) > 8 and operands[6]
    if not isinstance(weight, State) or weight.tensor.dim() != 4 or transposed:
        raise DSPFormatError("a convolution that is not two-dimensional, or whose weight is no parameter")
    settings = (tuple(stride), tuple(padding) if not isinstance(padding, str) else padding, tuple(dilation))
    if isinstance(value, Gathered) and groups == 1 and not isinstance(padding, str):
        if weight.tensor.shape[1] != len(value.index):
            raise DSPFormatError(
                f"{weight.path} reads {weight.tensor.shape[1]} of {len(value.index)} channels"
            )
        return Branch(value.source, value.index, weight, bias, settings)
    out_channels, in_channels, height, width = weight.tensor.shape
    kernel = (height, width)
    conv = nn.Conv2d(in_channels * groups, out_channels, kernel, *settings, groups, bias is not None)
    copy_state(conv.weight, weight)
    if conv.bias is not None:
        copy_state(conv.bias, bias)
    return walk.module(weight.path.rpartition(".")[0], conv, value, out_channels)


def _batch_norm(walk: Walk, operands: list[Any]) -> Any:
    value, *tensors = operands[:5]
    training, momentum, eps = operands[5:8]
    if training or not all(isinstance(tensor, State) for tensor in tensors):
        raise DSPFormatError("a batch norm in training mode, or without weight, bias and statistics")
    if isinstance(value, Branch) and value.norm is None and not value.relu:
        weight, bias, mean, variance = tensors
        return replace(value, norm=(weight, bias, mean, variance), norm_settings=(eps, momentum))
    norm = nn.BatchNorm2d(len(tensors[0].tensor), eps, momentum)
    for part, tensor in zip(NORM, tensors, strict=True):
        copy_state(getattr(norm, part), tensor)
    path = tensors[0].path.rpartition(".")[0]
    return walk.module(path, norm, value, len(tensors[0].tensor))


def _relu(walk: Walk, operands: list[Any]) -> Any:
    value = operands[0]
    if isinstance(value, Branch) and not value.relu:
        return replace(value, relu=True)
    return walk.call(torch.relu, value)


def _concat(walk: Walk, operands: list[Any]) -> Any:
    values, dim = operands
    if dim != 1 or not values:
        raise DSPFormatError(f"{len(values)} tensors are concatenated along dimension {dim}")
    if all(isinstance(value, Branch) for value in values):
        sizes = [value.weight.tensor.shape[0] for value in values]
        places = [range(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(len(sizes))]
        return walk.joined(values, places, sum(sizes))
    images = [walk.image(value) for value in values]
    widths = [image.channels for image in images]
    total = None if None in widths else sum(width for width in widths if width is not None)
    return Image(walk.graph.call_function(torch.cat, ([image.node for image in images], 1)), total)


def _index_add(walk: Walk, operands: list[Any]) -> Any:
    base, dim, index, branch = operands[:4]
    alpha = operands[4] if len(operands) > 4 else 1
    if dim != 1 or alpha != 1 or not isinstance(branch, Branch):
        raise DSPFormatError("index_add of something other than a branch, into other than channels")
    if not isinstance(base, Scatter):
        base = Scatter(walk.image(base), (), ())
    place = _index(index, "an index to add to")
    # Branches of other sources or forms would be another convolution.
    return replace(base, branches=(*base.branches, branch), places=(*base.places, place))


def _add(walk: Walk, operands: list[Any]) -> Any:
    left, right = operands[:2]
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left + right
    if (operands[2] if len(operands) > 2 else 1) != 1:
        raise DSPFormatError("an addition with a factor")
    images = walk.image(left), walk.image(right)
    return Image(walk.graph.call_function(torch.add, tuple(i.node for i in images)), images[0].channels)


def _max_pool(walk: Walk, operands: list[Any]) -> Any:
    walk.pooled = True
    value, *settings = operands
    return walk.call(F.max_pool2d, value, *(tuple(s) if isinstance(s, list) else s for s in settings))


def _reshape(walk: Walk, operands: list[Any]) -> Any:
    """A view that keeps the batch and flattens the rest."""
    if len(operands) != 2 or not isinstance(operands[1], list) or len(operands[1]) != 2:
        raise DSPFormatError(f"a view as {operands[1:]}")
    return walk.call(torch.flatten, operands[0], 1)


def _linear(walk: Walk, operands: list[Any]) -> Any:
    value, weight, bias = operands
    if not isinstance(weight, State) or weight.tensor.dim() != 2:
        raise DSPFormatError("a linear layer whose weight is no parameter")
    linear = nn.Linear(weight.tensor.shape[1], weight.tensor.shape[0], bias is not None)
    copy_state(linear.weight, weight)
    if bias is not None:
        copy_state(linear.bias, bias)
    return walk.module(weight.path.rpartition(".")[0], linear, value, weight.tensor.shape[0])


def _transposed(walk: Walk, operands: list[Any]) -> Any:
    if not isinstance(operands[0], State):
        raise DSPFormatError("a transposed tensor that is no parameter")
    return operands[0]  # only addmm reads it


def _size(walk: Walk, operands: list[Any]) -> Any:
    return -1 if operands[1] == 0 else math.nan  # the batch; other sizes are not needed


def _mean(walk: Walk, operands: list[Any]) -> Any:
    value, dims, keepdim = operands[:3]
    return Image(
        walk.graph.call_function(torch.mean, (walk.image(value).node, tuple(dims), bool(keepdim))), None
    )


HANDLERS: dict[str, Callable[[Walk, list[Any]], Any]] = {
    "prim::Constant": lambda walk, o: o[0],
    "prim::GetAttr": _attribute,
    "prim::ListConstruct": lambda walk, o: list(o),
    "prim::TupleConstruct": lambda walk, o: list(o),
    "prim::ListUnpack": lambda walk, o: o[0] if len(o[0]) > 1 else o[0][0],
    "prim::TupleUnpack": lambda walk, o: o[0] if len(o[0]) > 1 else o[0][0],
    "prim::NumToTensor": lambda walk, o: o[0],
    "aten::Int": lambda walk, o: o[0],
    "aten::size": _size,
    "aten::take_along_dim": _gather,
    "aten::index_select": _gather,
    "aten::_convolution": _convolution,
    "aten::conv2d": _convolution,
    "aten::batch_norm": _batch_norm,
    "aten::relu": _relu,
    "aten::cat": _concat,
    "aten::index_add": _index_add,
    "aten::add": _add,
    "aten::max_pool2d": _max_pool,
    "aten::adaptive_avg_pool2d": lambda walk, o: walk.call(F.adaptive_avg_pool2d, o[0], tuple(o[1])),
    "aten::avg_pool2d": lambda walk, o: walk.call(
        F.avg_pool2d, *(tuple(v) if isinstance(v, list) else v for v in o)
    ),
    "aten::mean": _mean,
    "aten::flatten": lambda walk, o: walk.call(torch.flatten, *o),
    "aten::view": _reshape,
    "aten::reshape": _reshape,
    "aten::squeeze": lambda walk, o: walk.call(torch.squeeze, *o),
    "aten::linear": _linear,
    "aten::t": _transposed,
    "aten::addmm": lambda walk, o: _linear(walk, [o[1], o[2], o[0]]),
    "aten::dropout": lambda walk, o: o[0],
    "aten::contiguous": lambda walk, o: o[0],
    "aten::detach": lambda walk, o: o[0],
}
