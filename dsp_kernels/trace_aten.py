"""Operations of an exported graph (ATen) as the functions and methods that a model's own code calls.

The table of operations in ``trace_ops`` and the tables of files know those; so an operation is known or not
whichever way its network was traced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

__all__ = ["is_check", "plain_call"]

_LAST = 2**63 - 1
_WHOLE: tuple[Any, ...] = (None, 0, 0, _LAST, 1)  # arguments of a slice that leaves nothing out
# (op, target, args, kwargs); op "" says that the call is its first argument itself.
_Call = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
_CHECKS = {"_assert_scalar", "_assert_tensor_metadata", "_assert_async", "sym_constrain_range_for_size"}
_SAME = {"alias", "detach", "detach_", "lift_fresh_copy", "lift_fresh"}
_METHODS = {"view", "expand", "contiguous", "repeat", "unfold", "type_as", "view_as", "expand_as"}
_FUNCTIONAL_FIRST = {
    *("relu", "relu6", "silu", "gelu", "hardswish", "hardsigmoid", "leaky_relu", "elu", "dropout", "mish"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "softplus", "hardtanh", "linear", "layer_norm"),
    *("group_norm", "pixel_shuffle", "instance_norm", "feature_dropout"),
}
_RENAMED = {
    "mean.dim": torch.mean,
    "flatten.using_ints": torch.flatten,
    "split_with_sizes.default": torch.split,
    "split.sizes": torch.split,
    "softmax.int": torch.softmax,
    "sum.dim_IntList": torch.sum,
    "group_norm.default": F.group_norm,
}


def is_check(node: fx.Node) -> bool:
    """Whether a call computes nothing and only checks."""
    return getattr(node.target, "_opname", "") in _CHECKS


def plain_call(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    """What a model's code would have called for this node. args, kwargs: already those of the new graph."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None:  # an operator on sizes
        return "call_function", node.target, args, kwargs
    name, full = packet.__name__, f"{packet.__name__}.{getattr(node.target, '_overloadname', '')}"
    if not str(node.target).startswith("aten."):
        return "call_function", node.target, args, kwargs
    special: Callable[..., _Call | None] | None = _SPECIAL.get(name)
    made = special(args, kwargs) if special is not None else None
    if made is not None:
        return made
    if name in _SAME:
        return "", None, args[:1], {}
    if full in _RENAMED:
        return "call_function", _RENAMED[full], args, kwargs
    if name in _METHODS or (name.endswith("_") and hasattr(torch.Tensor, name)):
        return "call_method", name, args, kwargs
    places: list[Any] = [F, torch] if name in _FUNCTIONAL_FIRST else [torch, F]
    for place in places:
        if callable(getattr(place, name, None)) and full != "to.dtype":
            return "call_function", getattr(place, name), args, kwargs
    return "call_function", node.target, args, kwargs


def _slice(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    source, dim, start, stop, step = (*args, *_WHOLE[len(args) :])
    if kwargs or not isinstance(dim, int) or not 0 <= dim < 4:
        return None
    if start in (None, 0) and stop in (None, _LAST) and step == 1:
        return "", None, (source,), {}
    bounds = slice(start, None if stop == _LAST else stop, step)
    return "call_function", operator.getitem, (source, (*[slice(None)] * dim, bounds)), {}


def _size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    return "call_method", "size", args, kwargs


def _pad(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    amounts = args[1] if len(args) > 1 else kwargs["pad"]
    value = args[2] if len(args) > 2 else kwargs.get("value", 0)
    return "call_function", F.pad, (args[0], amounts, "constant", value), {}


def _upsample(mode: str) -> Callable[..., _Call | None]:
    def made(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        aligned = mode != "nearest"
        source, size, *rest = args
        scales = rest[aligned] if len(rest) > aligned else None
        if kwargs or not (size is None or isinstance(size, list | tuple)):
            return None
        settings: dict[str, Any] = {"size": size, "scale_factor": scales, "mode": mode}
        if size is not None:
            settings["scale_factor"] = None
        if aligned:
            settings["align_corners"] = rest[0]
        return "call_function", F.interpolate, (source,), settings

    return made


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
    if kwargs or len(args) != 9:
        return None
    source, weight, bias, mean, variance, training, momentum, eps, _ = args
    return "call_function", F.batch_norm, (source, mean, variance, weight, bias, training, momentum, eps), {}


def _layer_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    return "call_function", F.layer_norm, args[:5], kwargs


def _group_norm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    return "call_function", F.group_norm, args[:5], kwargs


_SPECIAL: dict[str, Callable[..., _Call | None]] = {
    "slice": _slice,
    "sym_size": _size,
    "constant_pad_nd": _pad,
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "upsample_nearest2d": _upsample("nearest"),
    "upsample_bilinear2d": _upsample("bilinear"),
    "upsample_bicubic2d": _upsample("bicubic"),
}
