"""Operations that join, cut or reorder channels, and those that mix them.

order: the result is exactly ``origin[:, order]``, where ``origin`` is the first input if it is not given.
grid: (a, b) of a tensor (batch, a, b, height, width), whose channels are a * b.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dsp_kernels.graph.operations.entry import Attributes, Call, Found, flat
from dsp_kernels.graph.operations.maps import full_index, is_literal


def layer(dims: int) -> Callable[[Call], Found]:
    """A module called with one tensor of this many dimensions."""
    return lambda call: {} if len(call.input or ()) == dims else None


def conv_function(call: Call) -> Found:
    """A convolution by parameters. Attributes: weight, bias, and settings as pairs."""
    read = call.settings(weight=None, bias=None, stride=1, padding=0, dilation=1, groups=1)
    weight, bias = call.traced(read["weight"]), call.traced(read["bias"])
    sizes = {name: flat(read[name]) for name in ("stride", "padding", "dilation", "groups")}
    plain = all(isinstance(size, int) for pair in sizes.values() for size in pair)
    known = all(node.value is not None for node in (weight, bias) if node is not None)
    if not call.is_map or not plain or not known or weight is None:
        return None
    held = {"weight": weight.value, "bias": bias and bias.value}
    return {**held, **{name: (pair[0], pair[-1]) for name, pair in sizes.items()}}


def concat(call: Call) -> Found:
    """Tensors joined along dimension 1."""
    parts, dim = call.argument(0, "tensors", None), call.argument(1, "dim", call.node.kwargs.get("axis", 0))
    if not isinstance(parts, list | tuple) or not all(isinstance(part, fx.Node) for part in parts):
        return None
    if call.output is None or len(call.output) not in (2, 4) or dim not in (1, 1 - len(call.output)):
        return None
    return {"operands": tuple(part.name for part in parts)}


def joined(attributes: Mapping[str, Any], values: Sequence[Tensor], frozen: bool) -> Tensor:
    """Constants of tensors that are joined."""
    return torch.cat(list(values))


def split(call: Call) -> Found:
    """Attributes: sizes, width."""
    source, shape, dim = call.first, call.input, call.argument(2, "dim", 0)
    if source is None or shape is None or len(shape) not in (2, 4) or dim not in (1, 1 - len(shape)):
        return None
    chunks = call.target == "chunk"
    amount = call.argument(1, "chunks" if chunks else "split_size_or_sections", None)
    amount = call.node.kwargs.get("split_size", amount)
    width = source.width
    if isinstance(amount, list | tuple):
        plain = all(isinstance(size, int) for size in amount) and sum(amount) == width
        return {"sizes": tuple(amount), "width": width, "rigid": True} if plain else None
    if not isinstance(amount, int):
        return None
    step = -(-width // amount) if chunks else amount
    sizes = tuple(min(step, width - start) for start in range(0, width, step))
    if not chunks or len(sizes) != amount or len(set(sizes)) > 1:
        return {"sizes": sizes, "width": width, "rigid": True}
    return {"sizes": sizes, "width": width, "parts": amount}  # equal parts that lose the same channels


def part_of_split(call: Call) -> Found:
    """One tensor of a split."""
    source, which = call.first, call.node.args[1]
    sizes: tuple[int, ...] = source.attributes.get("sizes", ()) if source is not None else ()
    if not isinstance(which, int) or not -len(sizes) <= which < len(sizes):
        return None
    start = sum(sizes[: which % len(sizes)])
    return _selected(torch.arange(start, start + sizes[which]))


def slice_of_channels(call: Call) -> Found:
    """``x[:, a:b]``."""
    shape, index = call.input, call.node.args[1]
    if shape is None or len(shape) not in (2, 4) or not isinstance(index, tuple):
        return None
    index = full_index(index, len(shape))
    if index is None:
        return None
    batch, channels, *rest = index
    if any(part != slice(None) for part in (batch, *rest)) or not isinstance(channels, slice):
        return None
    bounds = (channels.start, channels.stop, channels.step)
    if not all(bound is None or isinstance(bound, int) for bound in bounds):
        return None
    chosen = torch.arange(shape[1])[channels]
    return _selected(chosen, rigid=len(chosen) < shape[1])


def _selected(index: Tensor, rigid: bool = False) -> Found:
    return {"index": (index,), "order": index, "rigid": rigid} if len(index) else None


def chosen(call: Call) -> Found:
    """x.index_select(1, index) or x[:, index], of a tensor that the model holds or a list in its code."""
    source, index = call.first, call.argument(2, "index", None)
    if call.target == "getitem":
        parts = call.node.args[1]
        if not isinstance(parts, tuple) or len(parts) < 2 or flat(parts[:1]) != [slice(None)]:
            return None
        index = parts[1] if all(part in (slice(None), Ellipsis) for part in parts[2:]) else None
    elif call.argument(1, "dim", None) != 1:
        return None
    if source is None or not source.batched or len(source.shape or ()) not in (2, 4):
        return None
    held = call.traced(index)
    if isinstance(index, list) and all(isinstance(number, int) for number in index):
        value: Tensor | None = torch.tensor(index)
    else:
        value = None if held is None else held.value
    if value is None or value.dim() != 1 or value.dtype != torch.int64 or not len(value):
        return None
    found = _selected(value.cpu() % source.width, rigid=held is None or held.kind != "state")
    operands = (source.name,) if held is None else (source.name, held.name)
    return None if found is None else {**found, "operands": operands}


def flip(call: Call) -> Found:
    """Channels, rows or columns in reverse order."""
    source, dims = call.first, flat((call.node.args[1:], call.argument(1, "dims", ())))
    if source is None or not call.is_map or not all(isinstance(dim, int) for dim in dims):
        return None
    axes, index = {dim % 4 for dim in dims}, torch.arange(source.width)
    if 0 in axes:
        return None
    index = index.flip(0) if 1 in axes else index
    return {"index": (index,), "order": index if axes == {1} else None}


def shuffle(call: Call) -> Found:
    """nn.ChannelShuffle."""
    if not call.is_map or call.first is None:
        return None
    groups, index = call.settings(groups=1)["groups"], torch.arange(call.first.width)
    order = index.view(groups, -1).T.flatten()
    return {"index": (order,), "order": order, "parts": groups}


def pixel_shuffle(call: Call) -> Found:
    """(N, C r r, H, W) -> (N, C, H r, W r): a channel is made of r r channels."""
    if call.output is None or call.first is None or not call.is_map or not call.output[1]:
        return None
    made, each = torch.arange(call.output[1]), call.first.width // call.output[1]
    return {"index": tuple(made * each + place for place in range(each)), "factor": math.isqrt(each)}


def pixel_unshuffle(call: Call) -> Found:
    """(N, C, H r, W r) -> (N, C r r, H, W)."""
    if call.output is None or call.first is None or not call.is_map:
        return None
    return {"index": (torch.arange(call.output[1]) // (call.output[1] // call.first.width),)}


def equal_constants(attributes: Mapping[str, Any], values: Sequence[Tensor], frozen: bool) -> Tensor:
    """A channel that is made of several is constant where they are the same constant."""
    stacked = torch.stack(list(values))
    return torch.where((stacked == stacked[0]).all(0), stacked[0], torch.nan)


# -- a shuffle in three steps: (N, C, H, W) -> (N, a, b, H, W) -> (N, b, a, H, W) -> (N, C, H, W)


def same_grid(call: Call) -> Attributes:
    """Of an identity, which keeps a grid."""
    if call.first is None or "grid" not in call.first.attributes:
        return {}
    return {name: call.first.attributes[name] for name in ("grid", "origin", "order", "width")}


def split_channels(call: Call) -> Found:
    """Attributes: grid, width, origin, order, parts, rigid."""
    source, new, sizes = call.first, call.output, call.sizes()
    if source is None or new is None or not call.is_map or (len(new), len(sizes)) != (5, 5):
        return None
    old = call.input or ()
    if old[0] != new[0] or old[-2:] != new[-2:]:
        return None
    grid = {"grid": (new[1], new[2]), "width": old[1], "origin": source.name, "order": torch.arange(old[1])}
    return {**grid, "parts": new[1], "rigid": is_literal(sizes[2])}


def swap_channels(call: Call) -> Found:
    """(N, a, b, H, W) -> (N, b, a, H, W)."""
    source = call.first
    if source is None or call.output is None or "grid" not in source.attributes:
        return None
    dims = [dim for dim in call.sizes() if isinstance(dim, int)]
    transposes = call.target == "transpose"
    if not ({dim % 5 for dim in dims} == {1, 2} if transposes else dims == [0, 2, 1, 3, 4]):
        return None
    first, second = source.attributes["grid"]
    index = torch.arange(source.width).view(first, second).T.flatten()
    order = source.attributes["order"][index]
    return {**same_grid(call), "grid": (second, first), "index": (index,), "order": order}


def join_channels(call: Call) -> Found:
    """(N, a, b, H, W) -> (N, a b, H, W)."""
    source, new, sizes = call.first, call.output, call.sizes()
    if source is None or new is None or (len(new), len(sizes)) != (4, 4) or "grid" not in source.attributes:
        return None
    old = source.shape or ()
    if old[0] != new[0] or old[-2:] != new[-2:] or source.width != new[1]:
        return None
    found = {name: source.attributes[name] for name in ("origin", "order")}
    return {**found, "rigid": is_literal(sizes[1])}
