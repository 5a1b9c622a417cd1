"""The one table of operations that a traced network may hold, and how each is recognised.

Every way of writing an operation (module, function, method) becomes one kind with one set of attributes.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dsp_kernels.graph.size_check import SizeCheck
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d

LEAF_TYPES: tuple[type[nn.Module], ...] = (PackedConv2d, FusedConv2d, SizeCheck)

Shape = tuple[int, ...] | None  # None for what is not a tensor
Attributes = dict[str, Any]
Found = Attributes | None  # the attributes of a call; None if it is another operation


@dataclass(frozen=True)
class Call:
    """One call of a module, function or method. shapes: of the result of this node and all nodes before it.

    root: the traced model. Without it a function that uses parameters of a module is opaque.
    """

    node: fx.Node
    module: nn.Module | None
    shapes: Mapping[str, Shape]
    root: nn.Module | None

    @property
    def input(self) -> Shape:
        """Shape of the first argument."""
        return self.shape_of(self.argument(0, "input", None))

    @property
    def output(self) -> Shape:
        """Shape of the result."""
        return self.shapes[self.node.name]

    def shape_of(self, value: Any) -> Shape:
        """Shape of an argument."""
        return self.shapes.get(value.name) if isinstance(value, fx.Node) else None

    def argument(self, place: int, name: str, default: Any) -> Any:
        """An argument, given by position or by name."""
        return self.node.args[place] if len(self.node.args) > place else self.node.kwargs.get(name, default)

    def settings(self, **defaults: Any) -> Attributes:
        """The module's settings of these names, or the arguments after the first, in this order."""
        if self.module is not None:
            return {name: getattr(self.module, name) for name in defaults}
        return {
            name: self.argument(i, name, default) for i, (name, default) in enumerate(defaults.items(), 1)
        }


@dataclass(frozen=True)
class Operation:
    """One way to recognise a kind.

    modules: classes; a subclass with a forward() of its own is another operation. calls: functions, and
    methods by name. attributes: of a call, or None if it is another operation after all.
    """

    kind: str
    modules: tuple[type[nn.Module], ...] = ()
    calls: tuple[Any, ...] = ()
    attributes: Callable[[Call], Found] = lambda call: {}


def _flat(value: Any) -> list[Any]:
    """All leaves of nested tuples, lists and dicts."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for part in value for leaf in _flat(part)] if isinstance(value, list | tuple) else [value]


def _is_map(call: Call) -> bool:
    return call.input is not None and len(call.input) == 4


def _on_map(condition: Callable[[Any], bool] = lambda module: True) -> Callable[[Call], Found]:
    """condition: on the module that is called."""
    return lambda call: {} if _is_map(call) and condition(call.module) else None


# -- elementwise operations


def _activation(name: str) -> Callable[[Call], Found]:
    return lambda call: {"function": name}


def _sum_of_equals(call: Call) -> Found:
    operands = call.node.args[:2]
    if len(operands) != 2 or call.node.kwargs.get("alpha", 1) != 1 or "out" in call.node.kwargs:
        return None
    # A parameter has no batch dimension, even if the example's batch size makes it look like one.
    if any(isinstance(operand, fx.Node) and operand.op == "get_attr" for operand in operands):
        return None
    left, right = map(call.shape_of, operands)
    return {} if left is not None and left == right else None


def _elementwise(call: Call) -> Found:
    """A function of one tensor, whose other arguments are constants."""
    node, module = call.node, call.module
    if module is not None:
        return {"apply": lambda values: module(values.clone())}
    leaves = _flat((node.args, node.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    constant = all(leaf is None or isinstance(leaf, bool | int | float | str | fx.Node) for leaf in leaves)
    if len(tensors) != 1 or not constant or call.shape_of(tensors[0]) is None or "out" in node.kwargs:
        return None

    def apply(values: Tensor) -> Tensor:
        args: Any = fx.node.map_arg(node.args, lambda _: values.clone())
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda _: values.clone())
        target: Any = node.target
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    return {"apply": apply}


def _one_slope(call: Call) -> Found:
    module = call.module
    if not isinstance(module, nn.PReLU) or module.num_parameters != 1 or not _is_map(call):
        return None
    slope = module.weight.detach()
    return {"apply": lambda values: F.prelu(values, slope.to(values))}


def _combination(operation: str) -> Callable[[Call], Found]:
    def attributes(call: Call) -> Found:
        operands = call.node.args
        if len(operands) != 2 or call.node.kwargs:
            return None
        left, right = map(call.shape_of, operands)
        if left is None or right is None or len(left) != len(right) or len(left) < 2 or left[1] != right[1]:
            return None
        names = tuple(operand.name for operand in operands if isinstance(operand, fx.Node))
        return {"operation": operation, "operands": names}

    return attributes


def _not_training(place: int) -> Callable[[Call], Found]:
    """place: of the argument ``training``."""
    return lambda call: {} if call.argument(place, "training", True) is False else None


# -- norms


def _has_one_channel_per_group(norm: nn.GroupNorm) -> bool:
    return norm.num_groups == norm.num_channels


def _norm_of_a_module(call: Call) -> Found:
    """F.batch_norm in eval mode with all tensors of one nn.BatchNorm2d."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, call.node.args, strict=False)) | call.node.kwargs
    mean = given.get("running_mean")
    if not isinstance(mean, fx.Node) or mean.op != "get_attr" or call.root is None:
        return None
    path = str(mean.target).rpartition(".")[0]
    module = call.root.get_submodule(path)
    if not isinstance(module, nn.BatchNorm2d) or given.get("training", False) is not False:
        return None
    for name in ("running_mean", "running_var", *(("weight", "bias") if module.affine else ())):
        value = given.get(name)
        if not isinstance(value, fx.Node) or str(value.target) != f"{path}.{name}":
            return None
    others = module.affine or (given.get("weight") is None and given.get("bias") is None)
    return {"module": module, "path": path} if others and given.get("eps", 1e-5) == module.eps else None


# -- operations on the feature map: pools, padding, reductions


def _max_pool(call: Call) -> Found:
    names = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
    read = call.settings(**names, return_indices=False)
    return None if read.pop("return_indices") else _with_pairs(read)


def _avg_pool(call: Call) -> Found:
    names = {"kernel_size": None, "stride": None, "padding": 0, "ceil_mode": False, "count_include_pad": True}
    return _with_pairs(call.settings(**names, divisor_override=None))


def _with_pairs(read: Attributes) -> Found:
    read["stride"] = read["stride"] or read["kernel_size"]
    for name in {"kernel_size", "stride", "padding", "dilation"} & set(read):
        sizes = _flat(read[name])
        if not all(isinstance(size, int) for size in sizes):  # computed from the size of the map
            return None
        read[name] = (sizes[0], sizes[-1])
    return read


def _returns_no_indices(pool: nn.Module | None) -> bool:
    return not getattr(pool, "return_indices", False)


def _to_one_pixel(call: Call) -> Found:
    # A size of None keeps the input's.
    size = call.settings(output_size=None)["output_size"]
    return (
        {"keepdim": True} if size == 1 or (isinstance(size, tuple | list) and list(size) == [1, 1]) else None
    )


def _global_mean(call: Call) -> Found:
    read = call.settings(dim=None, keepdim=False, dtype=None)
    dims = read["dim"] if isinstance(read["dim"], tuple | list) else (read["dim"],)
    if not _is_map(call) or read["dtype"] is not None or None in dims:
        return None
    return {"keepdim": bool(read["keepdim"])} if sorted(dim % 4 for dim in dims) == [2, 3] else None


def _reduction_of_map(call: Call) -> Found:
    """mean, amax and amin leave a channel that is constant in each map as it is."""
    shape, dims = call.input, call.argument(1, "dim", None)
    dims = dims if isinstance(dims, list | tuple) else (dims,)
    if shape is None or not dims or "dtype" in call.node.kwargs:
        return None
    return {} if all(isinstance(dim, int) and dim % len(shape) >= 2 for dim in dims) else None


def _flatten(call: Call) -> Found:
    """(batch, channels, height, width) -> (batch, channels * height * width)."""
    before, after = call.input, call.output
    if before is None or after is None or len(before) != 4 or len(after) != 2 or after[0] != before[0]:
        return None
    # view(-1, n) would have another batch size for images of another size.
    sizes = _flat((call.node.args[1:], call.argument(1, "shape", ())))
    return None if call.node.target in _RESHAPE and sizes[:1] == [-1] else {}


def _pad(call: Call) -> Found:
    if not _is_map(call):
        return None
    if call.module is not None:
        constant = isinstance(call.module, nn.ConstantPad2d)
        value = float(call.module.value) if isinstance(call.module, nn.ConstantPad2d) else 0.0
        return {"mode": "constant" if constant else "other", "value": value}
    read = call.settings(pad=(), mode="constant", value=None)
    if (
        not isinstance(read["pad"], list | tuple)
        or len(read["pad"]) > 4
        or isinstance(read["value"], fx.Node)
    ):
        return None
    return {"mode": read["mode"], "value": float(read["value"] or 0.0)}


def _of_one_group(call: Call) -> Found:
    plain = isinstance(call.module, nn.ConvTranspose2d) and call.module.groups == 1
    return {} if plain and len(call.node.args) == 1 and _is_map(call) else None


# -- channels joined, cut and reordered. rigid: the code names a number of channels or the index of one, so it
# -- is wrong after channels are removed.


def _names_size(size: Any) -> bool:
    """Whether a size is a number in the model's code: not -1 and not computed from another size."""
    return isinstance(size, int) and size > 0


def _concat(call: Call) -> Found:
    parts, dim = call.argument(0, "tensors", None), call.argument(1, "dim", call.node.kwargs.get("axis", 0))
    if not isinstance(parts, list | tuple) or not all(isinstance(part, fx.Node) for part in parts):
        return None
    if call.output is None or len(call.output) not in (2, 4) or dim not in (1, 1 - len(call.output)):
        return None
    return {"operands": tuple(part.name for part in parts)}


def _split(call: Call) -> Found:
    chunks = call.node.target in (torch.chunk, "chunk")
    shape, dim = call.input, call.argument(2, "dim", 0)
    if shape is None or len(shape) not in (2, 4) or dim not in (1, 1 - len(shape)):
        return None
    amount = call.argument(1, "chunks" if chunks else "split_size_or_sections", None)
    amount = call.node.kwargs.get("split_size", amount)
    if isinstance(amount, list | tuple):
        plain = all(isinstance(size, int) for size in amount)
        return {"sizes": tuple(amount), "rigid": True} if plain else None
    if not isinstance(amount, int):
        return None
    width = shape[1]
    step = -(-width // amount) if chunks else amount
    sizes = tuple(min(step, width - start) for start in range(0, width, step))
    # Equal chunks stay equal if each loses the same channels.
    return {"sizes": sizes, "rigid": not chunks or len(sizes) != amount or len(set(sizes)) > 1}


def _part_of_split(call: Call) -> Found:
    source, which = call.node.args[:2]
    if not isinstance(source, fx.Node) or not isinstance(which, int):
        return None
    kind, attributes = classify(source, None, call.shapes)
    sizes = attributes.get("sizes", ())
    if kind != "split" or not -len(sizes) <= which < len(sizes):
        return None
    start = sum(sizes[: which % len(sizes)])
    return {"start": start, "stop": start + sizes[which], "rigid": False}


def _slice_of_channels(call: Call) -> Found:
    shape, index = call.input, call.node.args[1]
    if shape is None or len(shape) not in (2, 4) or not isinstance(index, tuple):
        return None
    index = _full_index(index, len(shape))
    if index is None:
        return None
    batch, channels, *rest = index
    if any(part != slice(None) for part in (batch, *rest)) or not isinstance(channels, slice):
        return None
    if channels.step not in (None, 1) or not all(
        bound is None or isinstance(bound, int) for bound in (channels.start, channels.stop)
    ):
        return None
    start, stop, _ = channels.indices(shape[1])
    return {"start": start, "stop": stop, "rigid": (start, stop) != (0, shape[1])}


def _full_index(index: Any, dims: int) -> tuple[Any, ...] | None:
    """One entry per dimension, without ellipsis; None if it holds more than slices, integers and None."""
    index = index if isinstance(index, tuple) else (index,)
    ellipses = [place for place, part in enumerate(index) if part is Ellipsis] or [len(index)]
    parts = [part for part in index if part is not Ellipsis]
    if len(ellipses) > 1 or not all(part is None or isinstance(part, slice | int) for part in parts):
        return None
    skipped = dims - sum(part is not None for part in parts)
    parts[ellipses[0] : ellipses[0]] = [slice(None)] * skipped
    return tuple(parts)


def _shuffle(call: Call) -> Found:
    return call.settings(groups=1) if _is_map(call) else None


def _reshape_of_channels(before: int, after: int) -> Callable[[Call], Found]:
    """(N, C, H, W) -> (N, g, C / g, H, W) or back. before, after: 4 and 5, or 5 and 4 dimensions."""

    def attributes(call: Call) -> Found:
        old, new, sizes = call.input, call.output, _flat(call.node.args[1:])
        if old is None or new is None or (len(old), len(new), len(sizes)) != (before, after, after):
            return None
        if old[0] != new[0] or old[-2:] != new[-2:]:
            return None
        if after == 5:
            return {"groups": new[1], "rigid": _names_size(sizes[2])}
        return {"rigid": _names_size(sizes[1])} if old[1] * old[2] == new[1] else None

    return attributes


def _swap_groups(call: Call) -> Found:
    if call.input is None or call.output is None or not len(call.input) == len(call.output) == 5:
        return None
    dims = [dim for dim in _flat(call.node.args[1:]) if isinstance(dim, int)]
    swaps = {dim % 5 for dim in dims} == {1, 2} if call.node.target in _TRANSPOSE else dims == [0, 2, 1, 3, 4]
    return {} if swaps else None


def _same_channels(call: Call) -> Found:
    """Batch and channels stay; only the map of each channel is reshaped, cut or repeated."""
    before, after, node = call.input, call.output, call.node
    if before is None or after is None or min(len(before), len(after)) < 2 or before[:2] != after[:2]:
        return None
    if max(len(before), len(after)) > 4 or "out" in node.kwargs:
        return None
    name = str(getattr(node.target, "__name__", node.target))
    if name in ("reshape", "view", "expand"):  # with equal leading sizes no element changes its channel
        sizes = _flat(node.args[1:])
        return {"rigid": _names_size(sizes[1])} if len(sizes) == len(after) and not node.kwargs else None
    if name == "flatten":
        first = call.argument(1, "start_dim", 0)
        inside = isinstance(first, int) and first % len(before) >= 2
    elif name in ("unsqueeze", "squeeze"):
        count = len(before) + (name == "unsqueeze")
        dims = _flat(call.argument(1, "dim", None))
        inside = all(isinstance(dim, int) and dim % count >= 2 for dim in dims)
    elif name == "getitem":
        index = _full_index(node.args[1], len(before)) or ()
        inside = index[:2] == (slice(None), slice(None))
    else:
        inside = name == "expand_as"
    return {"rigid": False} if inside else None


# -- the table


_POINTWISE_MODULES = (
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.GELU, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Mish),
    *(nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
    nn.Threshold,
)
_POINTWISE_NAMES = [
    name + end
    for name in (
        *("sigmoid", "hardsigmoid", "tanh", "gelu", "elu", "selu", "celu", "leaky_relu", "mish", "hardtanh"),
        *("softplus", "softsign", "logsigmoid", "relu", "relu6", "silu", "hardswish", "clamp", "clip", "abs"),
        *("neg", "exp", "sqrt", "square", "pow", "add", "sub", "mul", "div", "clone", "float", "double"),
    )
    for end in ("", "_")
]
_POINTWISE = (
    *_POINTWISE_NAMES,  # methods
    *{getattr(place, name) for place in (torch, F) for name in _POINTWISE_NAMES if hasattr(place, name)},
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
)
_ADD = (operator.add, operator.iadd, torch.add, "add", "add_")
_SUBTRACT = (operator.sub, operator.isub, torch.sub, "sub", "sub_")
_MULTIPLY = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
_RELU = (F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
_DROPOUT = (F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout)
_MEAN = (torch.mean, "mean")
_RESHAPE = (torch.reshape, "view", "reshape")
_FLATTEN = (torch.flatten, "flatten")
_TRANSPOSE = (torch.transpose, "transpose")
_SQUEEZE = (torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze")
_RESIZE = (*_RESHAPE, *_FLATTEN, *_SQUEEZE, "expand", "expand_as", operator.getitem)
_PADS = (nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
_CHANNEL_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
_CHANNEL_NORM = (F.group_norm, F.layer_norm, F.local_response_norm, torch.group_norm, torch.layer_norm)
_ADAPTIVE_POOLS = (nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
_ADAPTIVE_POOL = (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)

# The first entry that fits a call is its kind.
OPERATIONS = (
    Operation("packed_conv", (PackedConv2d,)),
    Operation("fused_conv", (FusedConv2d,)),
    Operation("size_check", (SizeCheck,)),  # the identity, for images of some sizes
    Operation("conv", (nn.Conv2d,)),
    Operation("linear", (nn.Linear,)),
    Operation("conv_transpose", (nn.ConvTranspose2d,), (), _of_one_group),
    # function: a name in activations.ACTIVATIONS
    Operation("activation", (nn.ReLU,), _RELU, _activation("relu")),
    Operation("activation", (nn.ReLU6,), (F.relu6,), _activation("relu6")),
    Operation("activation", (nn.SiLU,), (F.silu,), _activation("silu")),
    Operation("activation", (nn.Hardswish,), (F.hardswish,), _activation("hardswish")),
    Operation("identity", (nn.Identity, nn.Dropout, nn.Dropout2d), ("contiguous",)),
    Operation("identity", (), _DROPOUT, _not_training(2)),
    Operation("identity", (), ("torchvision.stochastic_depth",), _not_training(3)),
    Operation("add", (), (*_ADD, "__add__", "__iadd__"), _sum_of_equals),  # of two tensors of one shape
    # apply: the function of one tensor; it may map 0 to something else
    Operation("elementwise", _POINTWISE_MODULES, _POINTWISE, _elementwise),
    Operation("elementwise", (nn.PReLU,), (), _one_slope),
    # operation, operands: of two tensors with as many channels, which may broadcast over the map
    Operation("combine", (), _ADD, _combination("add")),
    Operation("combine", (), _SUBTRACT, _combination("subtract")),
    Operation("combine", (), _MULTIPLY, _combination("multiply")),
    Operation("batch_norm", (nn.BatchNorm2d,), (), _on_map(lambda norm: norm.running_mean is not None)),
    # module, path: F.batch_norm with the tensors of this module
    Operation("functional_norm", (), (F.batch_norm,), _norm_of_a_module),
    Operation("instance_norm", (nn.InstanceNorm2d,), (), _on_map()),
    Operation("instance_norm", (nn.GroupNorm,), (), _on_map(_has_one_channel_per_group)),
    Operation("norm_over_channels", _CHANNEL_NORMS, _CHANNEL_NORM),  # each channel depends on others
    # kernel_size, stride, padding, ...: as of nn.MaxPool2d and nn.AvgPool2d, sizes as pairs
    Operation("max_pool", (nn.MaxPool2d,), (F.max_pool2d, torch.max_pool2d), _max_pool),
    Operation("avg_pool", (nn.AvgPool2d,), (F.avg_pool2d,), _avg_pool),
    Operation("global_avg_pool", (nn.AdaptiveAvgPool2d,), (F.adaptive_avg_pool2d,), _to_one_pixel),  # keepdim
    Operation("global_avg_pool", (), _MEAN, _global_mean),
    Operation(
        "adaptive_pool", _ADAPTIVE_POOLS, _ADAPTIVE_POOL, _on_map(_returns_no_indices)
    ),  # to more than one pixel
    Operation("spatial_mean", (), (*_MEAN, torch.amax, "amax", torch.amin, "amin"), _reduction_of_map),
    Operation("pad", _PADS, (F.pad,), _pad),  # mode, value
    Operation("interpolate", (nn.Upsample,), (F.interpolate,), _on_map()),
    Operation("flatten", (nn.Flatten,), (*_FLATTEN, *_RESHAPE), _flatten),
    Operation("concat", (), (torch.cat, torch.concat, torch.concatenate), _concat),  # operands
    Operation("split", (), (torch.chunk, "chunk", torch.split, "split"), _split),  # sizes, rigid
    Operation("piece", (), (operator.getitem,), _part_of_split),  # start, stop, rigid
    Operation("piece", (), (operator.getitem,), _slice_of_channels),
    Operation("channel_shuffle", (nn.ChannelShuffle,), (), _shuffle),  # groups
    # (N, C, H, W) -> (N, a, b, H, W) -> (N, b, a, H, W) -> (N, C, H, W); groups: a
    Operation("split_channels", (), _RESHAPE, _reshape_of_channels(4, 5)),  # groups, rigid
    Operation("swap_channels", (), (*_TRANSPOSE, torch.permute, "permute"), _swap_groups),
    Operation("join_channels", (), _RESHAPE, _reshape_of_channels(5, 4)),  # rigid
    Operation("same_channels", (), _RESIZE, _same_channels),  # rigid
)

# "scalar": not a tensor, such as a size. "output": of one tensor. "opaque": any other call.
KINDS = tuple(dict.fromkeys(("input", *(entry.kind for entry in OPERATIONS), "scalar", "output", "opaque")))

_BY_CALL: dict[Any, list[Operation]] = {}
for _entry in OPERATIONS:
    for _call in _entry.calls:
        _BY_CALL.setdefault(_call, []).append(_entry)


def classify(
    node: fx.Node, module: nn.Module | None, shapes: Mapping[str, Shape], root: nn.Module | None = None
) -> tuple[str, Attributes]:
    """Kind and attributes of an fx node. module: that it calls; shapes, root: see ``Call``."""
    if node.op == "placeholder":
        return "input", {}
    if node.op == "output":
        return ("output" if isinstance(node.args[0], fx.Node) else "opaque"), {}
    call = Call(node, module, shapes, root)
    for entry in _candidates(call):
        attributes = entry.attributes(call)
        if attributes is not None:
            return entry.kind, attributes
    return ("scalar" if call.output is None and module is None else "opaque"), {}


def _candidates(call: Call) -> Sequence[Operation]:
    if call.module is not None:
        forward, kinds = type(call.module).forward, type(call.module).__mro__
        return [
            entry
            for entry in OPERATIONS
            if any(kind in kinds and forward is kind.forward for kind in entry.modules)
        ]
    target: Any = call.node.target
    if call.node.op not in ("call_function", "call_method"):
        return []
    if str(getattr(target, "__module__", "")).startswith("torchvision."):  # which need not be installed
        target = f"torchvision.{target.__name__}"
    found = _BY_CALL.get(target, [])
    # A tuple of tensors is known only as the parts of a split.
    return [entry for entry in found if entry.kind == "split"] if call.output is None else found
