"""Operations on the map of every channel: pools, padding, reductions and reshapes of the map."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsp_kernels.graph.operations.entry import Attributes, Call, Found, flat, zeros_of

Pair = tuple[int, int]


def max_pool(call: Call) -> Found:
    """Attributes: as of nn.MaxPool2d, sizes as pairs."""
    names = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    read = call.settings(**names, return_indices=False)
    return None if read.pop("return_indices") else _with_pairs(read)


def avg_pool(call: Call) -> Found:
    """Attributes: as of nn.AvgPool2d, sizes as pairs."""
    names = {"kernel_size": None, "stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True}
    return _with_pairs(call.settings(**names, divisor_override=None))


def _with_pairs(read: Attributes) -> Found:
    read["stride"] = read["stride"] or read["kernel_size"]
    for name in {"kernel_size", "stride", "padding", "dilation"} & set(read):
        sizes = flat(read[name])
        if not all(isinstance(size, int) for size in sizes):  # computed from the size of the map
            return None
        read[name] = (sizes[0], sizes[-1])
    return read


def averaged(attributes: Mapping[str, Any], values: Sequence[Tensor], frozen: bool) -> Tensor:
    """Constants after an average pool."""
    counts_zeros = any(attributes["padding"]) and attributes["count_include_pad"]
    return zeros_of(values[0]) if counts_zeros or attributes["divisor_override"] is not None else values[0]


def to_one_pixel(call: Call) -> Found:
    """An adaptive pool to 1 x 1. Attributes: keepdim."""
    # A size of None keeps the input's.
    size = call.settings(output_size=None)["output_size"]
    one = size == 1 or (isinstance(size, tuple | list) and list(size) == [1, 1])
    return {"keepdim": True} if one else None


def adaptive_pool(call: Call) -> Found:
    """Attributes: output_size, (height, width) of an average pool; None for another one."""
    if not call.is_map or getattr(call.module, "return_indices", False):
        return None
    size = call.settings(output_size=None)["output_size"]
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
    average = isinstance(call.module, nn.AdaptiveAvgPool2d) or call.target == "adaptive_avg_pool2d"
    known = average and len(pair) == 2 and all(isinstance(side, int) for side in pair)
    return {"output_size": pair if known else None}


def global_mean(call: Call) -> Found:
    """The mean over height and width. Attributes: keepdim."""
    read = call.settings(dim=None, keepdim=False, dtype=None)
    dims = read["dim"] if isinstance(read["dim"], tuple | list) else (read["dim"],)
    if not call.is_map or read["dtype"] is not None or None in dims:
        return None
    return {"keepdim": bool(read["keepdim"])} if sorted(dim % 4 for dim in dims) == [2, 3] else None


def reduction(call: Call) -> Found:
    """mean, amax and amin leave a channel that is constant in each map as it is."""
    shape, dims = call.input, call.argument(1, "dim", None)
    dims = dims if isinstance(dims, list | tuple) else (dims,)
    if shape is None or not dims or "dtype" in call.node.kwargs:
        return None
    return {} if all(isinstance(dim, int) and dim % len(shape) >= 2 for dim in dims) else None


def flatten(call: Call) -> Found:
    """(batch, channels, height, width) -> (batch, channels * height * width)."""
    before, after, source = call.input, call.output, call.first
    if before is None or after is None or len(before) != 4 or len(after) != 2 or after[0] != before[0]:
        return None
    reshapes = call.module is None and call.target in ("view", "reshape")
    sizes = flat((call.node.args[1:], call.argument(1, "shape", ())))
    # view(-1, n) would have another batch size for images of another size.
    if source is None or not source.width or (reshapes and sizes[:1] == [-1]):
        return None
    each = after[1] // source.width
    index = torch.arange(after[1]) // each
    return {"index": (index,), "rigid": reshapes and any(is_literal(n) and n > 1 for n in sizes)}


def pad(call: Call) -> Found:
    """Attributes: mode, value, pads: left, right and more, as the call gives them.

    like: the map whose size it pads to, if any; fit: the kind of the FitStep for that.
    """
    if not call.is_map:
        return None
    if call.module is not None:
        value = getattr(call.module, "value", None)
        mode = "other" if value is None else "constant"
        return {"mode": mode, "value": value, "pads": call.module.padding}
    read = call.settings(pad=(), mode="constant", value=None)
    sides, value = read["pad"], read["value"]
    if not isinstance(sides, list | tuple) or len(sides) > 4 or isinstance(value, fx.Node):
        return None
    found = {"mode": read["mode"], "value": float(value or 0.0), "pads": sides}
    for fit, both in _WAYS.items():

        def sides_of(new: Pair, old: Pair, both: Callable[[int], Pair] = both) -> tuple[int, ...]:
            return (*both(new[1] - old[1]), *both(new[0] - old[0]))

        if like := _sized_like(call, sides, sides_of):
            return {**found, "fit": fit, "like": like}
    return found


# How the pixels that a map lacks are added at both ends of an axis.
_WAYS: dict[str, Callable[[int], Pair]] = {
    "pad_end": lambda n: (0, n),
    "pad_around": lambda n: (n // 2, n - n // 2),
}


def padded(attributes: Mapping[str, Any], values: Sequence[Tensor], frozen: bool) -> Tensor:
    """Constants after padding."""
    if attributes["mode"] != "constant":
        return values[0]
    return torch.where(values[0] == attributes["value"], values[0], torch.nan)


def interpolated(call: Call) -> Found:
    """Attributes: fit, the kind of a FitStep or "", and like (a map of the new size), size or factor."""
    read = call.settings(size=None, scale_factor=None, mode="nearest", align_corners=None)
    if not call.is_map:
        return None
    size, factors = read["size"], flat(read["scale_factor"])
    known = {"nearest": "nearest", "bilinear": "corners" if read["align_corners"] else "bilinear"}
    if call.argument(6, "antialias", False):
        known = {}
    sizes = [size, size] if isinstance(size, int) else flat(size)
    found: Attributes = {"fit": known.get(read["mode"], "")}
    # PyTorch divides by other factors in float32, which rounds.
    if size is None and len(set(factors)) == 1 and factors[0] in (2, 4, 8, 16, 32):
        return {**found, "factor": int(factors[0])}
    if len(sizes) == 2 and all(map(is_literal, sizes)):
        return {**found, "size": tuple(sizes)}
    like = _sized_like(call, size, lambda new, old: new)
    return {**found, "like": like} if like else {"fit": ""}


_COUNTS = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)


def _sized_like(call: Call, value: Any, wanted: Callable[[Pair, Pair], tuple[int, ...]]) -> str:
    """The map, if any, with which ``value`` is wanted(its size, the input's size), whatever the sizes are.

    Tried with several sizes, because there are many ways to write it.
    """
    seen: set[str] = set()

    def compute(part: Any, shapes: Mapping[str, Any]) -> Any:
        if isinstance(part, list | tuple):
            return tuple(compute(one, shapes) for one in part)
        if not isinstance(part, fx.Node):
            return part
        if part.target in _COUNTS:
            return part.target(*compute(part.args, shapes))
        source: Any = part.args[0]
        index = list(part.args[1:])
        if not (part.target == "size" or (part.target is getattr and index == ["shape"])):
            raise ValueError
        seen.add(source.name)
        sizes = shapes[source.name]
        return sizes[index[0]] if part.target == "size" and index else sizes

    own = call.node.all_input_nodes[0].name
    try:
        compute(value, {name: node.shape for name, node in call.before.items()})
        like = (seen - {own}).pop()
        for new, old in (((31, 50), (15, 25)), ((6, 9), (8, 4)), ((7, 3), (7, 3)), ((40, 21), (11, 64))):
            if compute(value, {like: (10**6, 10**7, *new), own: (10**8, 10**9, *old)}) != wanted(new, old):
                return ""
    except (ValueError, KeyError, TypeError, IndexError):
        return ""
    return like if call.before[like].batched and len(call.before[like].shape or ()) == 4 else ""


def unflatten(call: Call) -> Found:
    """(batch, channels * r * r) -> (batch, channels, r, r). Attributes: factor, r; 0 for another map."""
    before, after, sizes = call.input, call.output, call.sizes()
    if call.first is None or not call.first.batched or before is None or after is None:
        return None
    if (len(before), len(after), len(sizes)) != (2, 4, 4) or before[0] != after[0] or is_literal(sizes[0]):
        return None
    fixed = after[2] == after[3] and all(map(is_literal, sizes[2:]))
    each, factor = after[2] * after[3], after[2] if fixed else 0
    index = tuple(torch.arange(after[1]) * each + place for place in range(each))
    return {"index": index, "factor": factor, "rigid": is_literal(sizes[1])} if each > 1 else None


def same_channels(call: Call) -> Found:
    """Batch and channels stay; only the map of each channel is reshaped, cut or repeated."""
    source, before, after, node = call.first, call.input, call.output, call.node
    if source is None or before is None or after is None or "out" in node.kwargs:
        return None
    if not source.batched:
        return _same_entries(call, before, after)
    if min(len(before), len(after)) < 2 or before[:2] != after[:2] or max(len(before), len(after)) > 4:
        return None
    if call.target in ("reshape", "view", "expand"):  # equal leading sizes: no element changes its channel
        sizes = call.sizes()
        return {"rigid": is_literal(sizes[1])} if len(sizes) == len(after) and not node.kwargs else None
    if call.target == "flatten":
        first = call.argument(1, "start_dim", 0)
        inside = isinstance(first, int) and first % len(before) >= 2
    elif call.target in ("unsqueeze", "squeeze"):
        count = len(before) + (call.target == "unsqueeze")
        dims = flat(call.argument(1, "dim", None))
        inside = all(isinstance(dim, int) and dim % count >= 2 for dim in dims)
    elif call.target == "getitem":
        index = full_index(node.args[1], len(before)) or ()
        inside = index[:2] == (slice(None), slice(None))
    else:
        inside = call.target == "expand_as"
    return {"rigid": False} if inside else None


def _same_entries(call: Call, before: tuple[int, ...], after: tuple[int, ...]) -> Found:
    """A parameter with all its entries in their order: [C] -> [1, C, 1, 1]."""
    keeps = call.target in ("reshape", "view", "unsqueeze", "squeeze", "getitem")
    if not keeps or torch.Size(before).numel() != torch.Size(after).numel():
        return None
    if call.target == "getitem" and full_index(call.node.args[1], len(before)) is None:
        return None
    reshapes = call.target in ("reshape", "view")
    return {"rigid": reshapes and any(is_literal(size) and size > 1 for size in call.sizes())}


def is_literal(size: Any) -> bool:
    """Whether a size is a number in the model's code: not -1 and not computed from another size."""
    return isinstance(size, int) and size > 0


def full_index(index: Any, dims: int) -> tuple[Any, ...] | None:
    """One entry per dimension, without ellipsis; None if it holds more than slices, integers and None."""
    index = index if isinstance(index, tuple) else (index,)
    ellipses = [place for place, part in enumerate(index) if part is Ellipsis] or [len(index)]
    parts = [part for part in index if part is not Ellipsis]
    if len(ellipses) > 1 or not all(part is None or isinstance(part, slice | int) for part in parts):
        return None
    skipped = dims - sum(part is not None for part in parts)
    parts[ellipses[0] : ellipses[0]] = [slice(None)] * skipped
    return tuple(parts)
