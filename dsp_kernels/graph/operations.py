"""The one table of operations that a traced network may hold, and how each is recognised.

Every way of writing an operation (module, function, method) becomes one kind with one set of attributes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dsp_kernels.graph.size_check import SizeCheck
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d

__all__ = [
    "CHANNEL_RULES",
    "KINDS",
    "LAYOUT_KINDS",
    "LEAF_TYPES",
    "Classified",
    "Shapes",
    "argument",
    "classify",
    "classify_function",
    "classify_module",
    "flat",
    "literal",
    "source_shape",
]

LAYOUT_KINDS = (
    "elementwise",  # attributes: apply, the function of one value; sigmoid(0) is not 0
    "combine",  # of two tensors that may broadcast over the map: operation ("add", "subtract", "multiply"),
    # operands
    "concat",  # along the channels; attributes: operands
    "split",  # the parts of a tensor along the channels; attributes: sizes, rigid
    "piece",  # one part of a split, or a slice of channels; attributes: start, stop, rigid
    "split_channels",  # (N, C, H, W) -> (N, g, C / g, H, W); attributes: groups, rigid
    "swap_channels",  # (N, a, b, H, W) -> (N, b, a, H, W)
    "join_channels",  # (N, a, b, H, W) -> (N, a * b, H, W); attributes: rigid
    "channel_shuffle",  # nn.ChannelShuffle; attributes: groups
    "conv_transpose",  # nn.ConvTranspose2d
    "functional_norm",  # F.batch_norm in eval mode with a module's tensors; attributes: module, path
    "instance_norm",  # nn.InstanceNorm2d, or nn.GroupNorm with one channel per group
    "norm_over_channels",  # group, layer and local response norms: channels depend on each other
    "adaptive_pool",  # to more than one place
    "pad",  # around the map; attributes: mode, value
    "interpolate",
    "spatial_mean",  # mean, maximum or minimum over axes of the map
    "same_channels",  # batch and channels as they are, the map cut, flattened, repeated; attributes: rigid
)

KINDS = (
    "input",
    "conv",  # nn.Conv2d
    "packed_conv",  # PackedConv2d
    "fused_conv",  # FusedConv2d
    "batch_norm",  # nn.BatchNorm2d with running statistics
    "activation",  # attributes: function, a name in activations.ACTIVATIONS
    "add",  # of two tensors of one shape
    "max_pool",  # attributes: kernel_size, stride, padding, dilation, ceil_mode
    "avg_pool",  # attributes: kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    "global_avg_pool",  # attributes: keepdim
    "flatten",  # (batch, channels, height, width) -> (batch, channels * height * width)
    "linear",  # nn.Linear
    "identity",  # dropout in eval mode, nn.Identity, contiguous()
    "size_check",  # SizeCheck: the identity, for images of some sizes
    "scalar",  # sizes and other numbers
    "output",  # of one tensor
    *LAYOUT_KINDS,
    "opaque",  # anything else
)

LEAF_TYPES: tuple[type[nn.Module], ...] = (PackedConv2d, FusedConv2d, SizeCheck)

_Attributes = dict[str, Any]
_Classified = tuple[str, _Attributes]

_ACTIVATION_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    F.relu6: "relu6",
    F.silu: "silu",
    F.hardswish: "hardswish",
    "relu": "relu",
    "relu_": "relu",
}
_ADD_FUNCTIONS = {operator.add, operator.iadd, torch.add, "add", "add_", "__add__", "__iadd__"}
_RESHAPE_FUNCTIONS = {torch.flatten, torch.reshape, "flatten", "view", "reshape"}
_MEAN_FUNCTIONS = {torch.mean, "mean"}
_IDENTITY_MODULES = (nn.Identity, nn.Dropout, nn.Dropout2d)
_IDENTITY_FUNCTIONS = {"contiguous"}


def classify(
    node: fx.Node,
    module: nn.Module | None,
    shapes: Mapping[str, tuple[int, ...] | None],
    root: nn.Module | None = None,
) -> _Classified:
    """Kind and attributes of one fx node; ``shapes`` holds the output shape of it and of all before it.

    root: the traced model; without it a function that uses a module's own parameters is opaque.
    """
    if node.op == "placeholder":
        return "input", {}
    if node.op == "output":
        return ("output", {}) if isinstance(node.args[0], fx.Node) else ("opaque", {})
    if module is not None:
        known = _classify_module(node, module, shapes)
        return classify_module(node, module, shapes) if known[0] == "opaque" else known
    if node.op not in ("call_function", "call_method"):
        return ("scalar", {}) if shapes[node.name] is None else ("opaque", {})
    if shapes[node.name] is None:
        layout = classify_function(node, shapes, root)
        return layout if layout[0] == "split" else ("scalar", {})
    known = _classify_function(node, shapes)
    return classify_function(node, shapes, root) if known[0] == "opaque" else known


def _classify_module(node: fx.Node, module: nn.Module, shapes: Mapping[str, Any]) -> _Classified:
    if isinstance(module, PackedConv2d):
        return "packed_conv", {}
    if isinstance(module, FusedConv2d):
        return "fused_conv", {}
    if isinstance(module, SizeCheck):
        return "size_check", {}
    # A subclass with its own forward is its own operation.
    if _is(module, nn.Conv2d):
        return "conv", {}
    if _is(module, nn.BatchNorm2d) and module.running_mean is not None:
        return "batch_norm", {}
    for activation_type, name in _ACTIVATION_MODULES.items():
        if _is(module, activation_type):
            return "activation", {"function": name}
    if _is(module, nn.Linear):
        return "linear", {}
    if isinstance(module, _IDENTITY_MODULES):
        return "identity", {}
    if _is(module, nn.MaxPool2d) and not module.return_indices:
        return "max_pool", _pool(module, "dilation", "ceil_mode")
    if _is(module, nn.AvgPool2d):
        return "avg_pool", _pool(module, "ceil_mode", "count_include_pad", "divisor_override")
    if _is(module, nn.AdaptiveAvgPool2d):
        return _adaptive_average(module.output_size)
    if _is(module, nn.Flatten):
        return _reshape(node, shapes)
    return "opaque", {}


def _classify_function(node: fx.Node, shapes: Mapping[str, Any]) -> _Classified:
    target = node.target
    if target in _ACTIVATION_FUNCTIONS:
        return "activation", {"function": _ACTIVATION_FUNCTIONS[target]}
    if target in _ADD_FUNCTIONS:
        return _add(node, shapes)
    if target in _RESHAPE_FUNCTIONS:
        return _reshape(node, shapes)
    if target in _MEAN_FUNCTIONS:
        return _mean(node, shapes)
    if target in _IDENTITY_FUNCTIONS:
        return "identity", {}
    if target is F.dropout:
        return ("opaque", {}) if _arguments(node, p=0.5, training=True)["training"] else ("identity", {})
    if target is F.adaptive_avg_pool2d:
        return _adaptive_average(_arguments(node, output_size=None)["output_size"])
    if target in (F.max_pool2d, torch.max_pool2d):
        read = _arguments(
            node, kernel_size=None, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
        )
        return ("opaque", {}) if read.pop("return_indices") else ("max_pool", _pool_pairs(read))
    if target is F.avg_pool2d:
        read = _arguments(
            node,
            kernel_size=None,
            stride=None,
            padding=0,
            ceil_mode=False,
            count_include_pad=True,
            divisor_override=None,
        )
        return "avg_pool", _pool_pairs(read)
    return "opaque", {}


def _is(module: nn.Module, kind: type[nn.Module]) -> bool:
    return isinstance(module, kind) and type(module).forward is kind.forward


def _add(node: fx.Node, shapes: Mapping[str, Any]) -> _Classified:
    operands = node.args[:2]
    both = len(operands) == 2 and all(isinstance(operand, fx.Node) for operand in operands)
    if not both or node.kwargs.get("alpha", 1) != 1 or "out" in node.kwargs:
        return "opaque", {}
    if any(isinstance(operand, fx.Node) and operand.op == "get_attr" for operand in operands):
        return "opaque", {}  # a parameter has no batch of its own, whatever the example's is
    left, right = (shapes[operand.name] for operand in operands if isinstance(operand, fx.Node))
    return ("add", {}) if left is not None and left == right else ("opaque", {})


def _adaptive_average(output_size: Any) -> _Classified:
    # None keeps the input's size: a mean over the map only if that happens to be one pixel.
    one = output_size == 1 or (isinstance(output_size, tuple | list) and tuple(output_size) == (1, 1))
    return ("global_avg_pool", {"keepdim": True}) if one else ("opaque", {})


def _mean(node: fx.Node, shapes: Mapping[str, Any]) -> _Classified:
    read = _arguments(node, dim=None, keepdim=False, dtype=None)
    shape = shapes[node.all_input_nodes[0].name]
    if shape is None or len(shape) != 4 or read["dtype"] is not None or read["dim"] is None:
        return "opaque", {}
    dims = read["dim"] if isinstance(read["dim"], tuple | list) else (read["dim"],)
    if sorted(dim % 4 for dim in dims) != [2, 3]:
        return "opaque", {}
    return "global_avg_pool", {"keepdim": bool(read["keepdim"])}


def _reshape(node: fx.Node, shapes: Mapping[str, Any]) -> _Classified:
    """A reshape that keeps the batch and flattens the rest; other reshapes move channels and stay opaque."""
    before, after = shapes[node.all_input_nodes[0].name], shapes[node.name]
    if before is None or len(before) != 4 or len(after) != 2 or after[0] != before[0]:
        return "opaque", {}
    if node.args[1:2] == (-1,) and node.target not in (torch.flatten, "flatten"):
        return "opaque", {}  # view(-1, n): for images of another size the batch would be another
    return "flatten", {}


def _pool(module: nn.Module, *names: str) -> _Attributes:
    read = {name: getattr(module, name) for name in ("kernel_size", "stride", "padding", *names)}
    return _pool_pairs(read)


def _pool_pairs(read: _Attributes) -> _Attributes:
    if read["stride"] is None or read["stride"] == []:
        read["stride"] = read["kernel_size"]
    for name in ("kernel_size", "stride", "padding", "dilation"):
        if name in read:
            read[name] = _pair(read[name])
    return read


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def _arguments(node: fx.Node, **defaults: Any) -> _Attributes:
    """The arguments after the tensor, by name, whichever way they were passed."""
    read = dict(defaults)
    read.update(zip(defaults, node.args[1:], strict=False))
    read.update({name: value for name, value in node.kwargs.items() if name in defaults})
    return read


_POINTWISE_MODULES = (
    *(nn.Sigmoid, nn.Hardsigmoid, nn.Tanh, nn.GELU, nn.ELU, nn.SELU, nn.CELU, nn.LeakyReLU, nn.Mish),
    *(nn.Hardtanh, nn.Softplus, nn.Softsign, nn.LogSigmoid, nn.Softshrink, nn.Hardshrink, nn.Tanhshrink),
    nn.Threshold,
)
_POINTWISE_NAMES = (
    *("sigmoid", "hardsigmoid", "tanh", "gelu", "elu", "selu", "celu", "leaky_relu", "mish", "hardtanh"),
    *("softplus", "softsign", "logsigmoid", "relu", "relu6", "silu", "hardswish", "clamp", "clip", "abs"),
    *("neg", "exp", "sqrt", "square", "pow", "add", "sub", "mul", "div", "clone", "float", "double"),
)
_POINTWISE_FUNCTIONS = {
    getattr(place, name + end)
    for place in (torch, F)
    for name in _POINTWISE_NAMES
    for end in ("", "_")
    if hasattr(place, name + end)
} | {
    *(operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, operator.neg),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
}
_POINTWISE_METHODS = {name + end for name in _POINTWISE_NAMES for end in ("", "_")}
_COMBINATIONS = {
    function: name
    for name, functions in {
        "add": (operator.add, operator.iadd, torch.add, "add", "add_"),
        "subtract": (operator.sub, operator.isub, torch.sub, "sub", "sub_"),
        "multiply": (operator.mul, operator.imul, torch.mul, "mul", "mul_"),
    }.items()
    for function in functions
}
_OVER_THE_MAP = (torch.mean, "mean", torch.amax, "amax", torch.amin, "amin")
_NORMS_OVER_CHANNELS = (F.group_norm, F.layer_norm, F.local_response_norm, torch.group_norm, torch.layer_norm)
_PADS = (nn.ZeroPad2d, nn.ConstantPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d)
# In eval mode these return their input; their argument ``training`` has this place.
_DROPS = {"dropout2d": 2, "alpha_dropout": 2, "feature_alpha_dropout": 2, "stochastic_depth": 3}


def classify_module(node: fx.Node, module: nn.Module, shapes: Shapes) -> Classified:
    """Kind and attributes of a call of a module that ``trace_ops`` does not know; opaque if unknown here."""
    forward, own = type(module).forward, source_shape(node, shapes)
    if any(forward is kind.forward for kind in _POINTWISE_MODULES if isinstance(module, kind)):
        return "elementwise", {"apply": lambda values: module(values.clone())}
    if isinstance(module, nn.GroupNorm | nn.LayerNorm | nn.LocalResponseNorm):
        single = isinstance(module, nn.GroupNorm) and module.num_groups == module.num_channels
        plain = forward is nn.GroupNorm.forward and own is not None and len(own) == 4
        return ("instance_norm", {}) if single and plain else ("norm_over_channels", {})
    if own is None or len(own) != 4:
        return "opaque", {}
    if forward is nn.PReLU.forward and isinstance(module, nn.PReLU) and module.num_parameters == 1:
        slope = module.weight.detach()
        return "elementwise", {"apply": lambda values: F.prelu(values, slope.to(values))}
    if forward is nn.ConvTranspose2d.forward and isinstance(module, nn.ConvTranspose2d):
        return ("conv_transpose", {}) if module.groups == 1 and len(node.args) == 1 else ("opaque", {})
    if isinstance(module, nn.InstanceNorm2d):
        return "instance_norm", {}
    if isinstance(module, nn.AdaptiveAvgPool2d) or (
        isinstance(module, nn.AdaptiveMaxPool2d) and not module.return_indices
    ):
        return "adaptive_pool", {}
    if isinstance(module, nn.Upsample):
        return "interpolate", {}
    if isinstance(module, nn.ChannelShuffle):
        return "channel_shuffle", {"groups": module.groups}
    if isinstance(module, _PADS):
        plain = isinstance(module, nn.ZeroPad2d | nn.ConstantPad2d)
        value = float(module.value) if isinstance(module, nn.ConstantPad2d) else 0.0
        return "pad", {"mode": "constant" if plain else "other", "value": value}
    return "opaque", {}


def classify_function(node: fx.Node, shapes: Shapes, root: nn.Module | None) -> Classified:
    """The same for a function or method. root: the traced model, where names of parameters lead to."""
    for rule in (_pointwise, _combination, *CHANNEL_RULES, _spatial, _over_the_map):
        found = rule(node, shapes)
        if found is not None:
            return found
    if node.target in _NORMS_OVER_CHANNELS:
        return "norm_over_channels", {}
    return _norm(node, root) or ("opaque", {})


def _pointwise(node: fx.Node, shapes: Shapes) -> Classified | None:
    target = node.target
    known = target in (_POINTWISE_METHODS if node.op == "call_method" else _POINTWISE_FUNCTIONS)
    nodes = [value for value in flat((node.args, node.kwargs)) if isinstance(value, fx.Node)]
    others = [value for value in flat((node.args, node.kwargs)) if not isinstance(value, fx.Node)]
    plain = all(value is None or isinstance(value, bool | int | float | str) for value in others)
    if not known or len(nodes) != 1 or not plain or shapes[nodes[0].name] is None or "out" in node.kwargs:
        return None

    def apply(values: Tensor) -> Tensor:
        args: Any = fx.node.map_arg(node.args, lambda _: values.clone())
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda _: values.clone())
        if node.op == "call_method":
            return getattr(args[0], str(target))(*args[1:], **kwargs)
        assert callable(target)
        return target(*args, **kwargs)

    return "elementwise", {"apply": apply}


def _combination(node: fx.Node, shapes: Shapes) -> Classified | None:
    operation = _COMBINATIONS.get(node.target)
    operands = node.args[:2]
    if operation is None or len(operands) != 2 or node.kwargs or len(node.args) > 2:
        return None
    names = [operand.name for operand in operands if isinstance(operand, fx.Node)]
    if len(names) != 2:
        return None
    left, right = (shapes[name] for name in names)
    if left is None or right is None or len(left) != len(right) or len(left) < 2 or left[1] != right[1]:
        return None
    return "combine", {"operation": operation, "operands": tuple(names)}


def _norm(node: fx.Node, root: nn.Module | None) -> Classified | None:
    if node.target not in (F.batch_norm, torch.batch_norm):
        return None
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    read = dict(zip(names, node.args, strict=False)) | node.kwargs
    held = read.get("running_mean")
    training = read.get("training", False)
    if not isinstance(held, fx.Node) or held.op != "get_attr" or training is not False or root is None:
        return None
    path = str(held.target).rpartition(".")[0]
    module = root.get_submodule(path)
    wanted = {"running_mean": held, "running_var": read.get("running_var")}
    wanted |= {name: read.get(name) for name in ("weight", "bias") if read.get(name) is not None}
    own = all(
        isinstance(value, fx.Node) and str(value.target) == f"{path}.{name}" for name, value in wanted.items()
    )
    if not own or not isinstance(module, nn.BatchNorm2d) or read.get("eps", 1e-5) != module.eps:
        return None
    if module.affine and len(wanted) != 4:
        return None
    return "functional_norm", {"module": module, "path": path}


def _spatial(node: fx.Node, shapes: Shapes) -> Classified | None:
    shape, after = source_shape(node, shapes), shapes[node.name]
    if shape is None or after is None or len(shape) != 4:
        return None
    name = getattr(node.target, "__name__", "")
    if name in _DROPS and argument(node, _DROPS[name], "training", True) is False:
        return "identity", {}
    if node.target is F.interpolate:
        return "interpolate", {}
    if node.target is F.adaptive_avg_pool2d or (name == "adaptive_max_pool2d" and len(after) == 4):
        return "adaptive_pool", {}
    if node.target is F.pad:
        amounts = argument(node, 1, "pad", ())
        if not isinstance(amounts, list | tuple) or len(amounts) > 4:
            return None
        mode, value = argument(node, 2, "mode", "constant"), argument(node, 3, "value", None)
        return "pad", {"mode": mode, "value": 0.0 if value is None else float(value)}
    return None


def _over_the_map(node: fx.Node, shapes: Shapes) -> Classified | None:
    """A constant map has itself as its mean and its largest value."""
    shape = source_shape(node, shapes)
    if (
        node.target not in _OVER_THE_MAP
        or shape is None
        or shapes[node.name] is None
        or "dtype" in node.kwargs
    ):
        return None
    dims = argument(node, 1, "dim", None)
    dims = dims if isinstance(dims, list | tuple) else (dims,)
    inside = bool(dims) and all(isinstance(dim, int) and dim % len(shape) >= 2 for dim in dims)
    return ("spatial_mean", {}) if inside else None


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


def _channel_reshape(node: fx.Node, shapes: Shapes) -> Classified | None:
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
CHANNEL_RULES = (_concat, _split, _piece, _channel_reshape, _same_channels)


Shapes = Mapping[str, tuple[int, ...] | None]  # node -> shape of its output, None where it is no tensor
Classified = tuple[str, dict[str, Any]]  # a kind of ``trace_ops.KINDS`` and its attributes


def source_shape(node: fx.Node, shapes: Shapes) -> tuple[int, ...] | None:
    """Shape of the first argument, None where that is no tensor."""
    source = node.args[0] if node.args else None
    return shapes.get(source.name) if isinstance(source, fx.Node) else None


def argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """The argument at this place, or of this name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def literal(value: Any) -> bool:
    """Whether a size is a number in the model's code, and not -1 or one computed from another size."""
    return isinstance(value, int) and value > 0


def flat(value: Any) -> Sequence[Any]:
    """All leaves of nested tuples, lists and dicts."""
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in flat(part)]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in flat(part)]
    return [value]
