"""Operations that cut, join, reorder or keep the channels of a tensor; a part of ``trace_layout``'s table."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from dsp_kernels.trace_arguments import Classified, Shapes, argument, flat, literal, source_shape

__all__ = ["CHANNEL_RULES"]

_RESHAPES = (torch.reshape, "view", "reshape")


def _concat(node: fx.Node, shapes: Shapes) -> Classified | None:
    if node.target not in (torch.cat, torch.concat, torch.concatenate):
        return None
    parts = node.args[0] if node.args else node.kwargs.get("tensors")
    if not isinstance(parts, list | tuple) or not all(isinstance(part, fx.Node) for part in parts):
        return None
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
    shape = shapes[node.name]
    if shape is None or len(shape) not in (2, 4) or not isinstance(dim, int) or dim % len(shape) != 1:
        return None
    return "concat", {"operands": tuple(part.name for part in parts if isinstance(part, fx.Node))}


def _split(node: fx.Node, shapes: Shapes) -> Classified | None:
    chunks = node.target in (torch.chunk, "chunk")
    shape = source_shape(node, shapes)
    if not (chunks or node.target in (torch.split, "split")) or shape is None or len(shape) not in (2, 4):
        return None
    amount = argument(node, 1, "chunks" if chunks else "split_size_or_sections", None)
    amount = node.kwargs.get("split_size", amount)
    dim = argument(node, 2, "dim", 0)
    if not isinstance(dim, int) or dim % len(shape) != 1:
        return None
    width = shape[1]
    if isinstance(amount, list | tuple):
        if not all(isinstance(size, int) for size in amount):
            return None
        return "split", {"sizes": tuple(amount), "rigid": True}
    if not isinstance(amount, int):
        return None
    step = -(-width // amount) if chunks else amount
    sizes = tuple(min(step, width - start) for start in range(0, width, step))
    # Equal parts stay equal parts if each loses the same channels.
    return "split", {"sizes": sizes, "rigid": not chunks or len(sizes) != amount or len(set(sizes)) > 1}


def _piece(node: fx.Node, shapes: Shapes) -> Classified | None:
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    source, which = node.args[0], node.args[1]
    if isinstance(which, int) and shapes.get(source.name) is None:
        parts = _split(source, shapes)
        if parts is None or not -len(parts[1]["sizes"]) <= which < len(parts[1]["sizes"]):
            return None
        sizes = parts[1]["sizes"]
        start = sum(sizes[: which % len(sizes)])
        return "piece", {"start": start, "stop": start + sizes[which], "rigid": False}
    shape = shapes.get(source.name)
    if shape is None or len(shape) not in (2, 4) or not isinstance(which, tuple):
        return None
    which = _in_full(which, len(shape))
    if not which:
        return None
    channels = which[1] if len(which) > 1 else slice(None)
    bounds = (channels.start, channels.stop) if isinstance(channels, slice) else (object(),)
    whole = all(part == slice(None) for part in (which[0], *which[2:]))
    if not whole or not isinstance(channels, slice) or channels.step not in (None, 1):
        return None
    if not all(bound is None or isinstance(bound, int) for bound in bounds):
        return None
    start, stop, _ = channels.indices(shape[1])
    return "piece", {"start": start, "stop": stop, "rigid": (start, stop) != (0, shape[1])}


def _reshape(node: fx.Node, shapes: Shapes) -> Classified | None:
    """Channels into groups of channels, groups exchanged, and back: a shuffle of channels."""
    before, after = source_shape(node, shapes), shapes[node.name]
    if before is None or after is None:
        return None
    if len(before) == len(after) == 5:
        dims = tuple(a for a in flat(node.args[1:]) if isinstance(a, int))
        swaps = node.target in (torch.transpose, "transpose") and {d % 5 for d in dims} == {1, 2}
        permutes = node.target in (torch.permute, "permute") and dims == (0, 2, 1, 3, 4)
        return ("swap_channels", {}) if swaps or permutes else None
    if node.target not in _RESHAPES or before[0] != after[0] or before[-2:] != after[-2:]:
        return None
    asked = list(flat(node.args[1:]))
    if len(asked) != len(after):
        return None
    if len(before) == 4 and len(after) == 5:
        return "split_channels", {"groups": after[1], "rigid": literal(asked[2])}
    if len(before) == 5 and len(after) == 4 and before[1] * before[2] == after[1]:
        return "join_channels", {"rigid": literal(asked[1])}
    return None


def _same_channels(node: fx.Node, shapes: Shapes) -> Classified | None:
    """What only changes the map of each channel, and maps of one place that come and go around a gate."""
    before, after = source_shape(node, shapes), shapes[node.name]
    if before is None or after is None or not min(len(before), len(after)) >= 2 or before[:2] != after[:2]:
        return None
    if max(len(before), len(after)) > 4 or "out" in node.kwargs:
        return None
    asked = list(flat(node.args[1:]))
    if node.target in (*_RESHAPES, "expand"):  # rows of memory: what follows equal leading sizes stays inside
        fits = len(asked) == len(after) and not node.kwargs
        return ("same_channels", {"rigid": literal(asked[1])}) if fits else None
    name = str(getattr(node.target, "__name__", node.target))
    if name == "flatten":
        first = argument(node, 1, "start_dim", 0)
        inside = isinstance(first, int) and first % len(before) >= 2
    elif name in ("unsqueeze", "squeeze"):
        dims = flat(argument(node, 1, "dim", None))
        count = len(before) + (name == "unsqueeze")
        inside = all(isinstance(dim, int) and dim % count >= 2 for dim in dims)
    elif node.target is operator.getitem:
        inside = _leaves_channels(node.args[1], len(before))
    else:
        inside = name == "expand_as"
    return ("same_channels", {"rigid": False}) if inside else None


def _leaves_channels(which: Any, dims: int) -> bool:
    """Whether an index takes all images and channels, and slices, places or new axes of the map."""
    parts = _in_full(which if isinstance(which, tuple) else (which,), dims)
    return parts is not None and len(parts) >= 2 and parts[0] == parts[1] == slice(None)


def _in_full(which: tuple[Any, ...], dims: int) -> tuple[Any, ...] | None:
    """An index with its ellipsis spelled out: x[..., 1:-1] cuts columns. None for another kind."""
    rests = [place for place, part in enumerate(which) if part is Ellipsis]
    if len(rests) > 1 or not all(
        part is None or isinstance(part, slice | int) for part in which if part is not ...
    ):
        return None
    if not rests:
        return which
    skipped = dims - sum(part is not None for part in which) + 1
    return (*which[: rests[0]], *[slice(None)] * skipped, *which[rests[0] + 1 :])


# Each gives None for what it does not know.
CHANNEL_RULES = (_concat, _split, _piece, _reshape, _same_channels)
