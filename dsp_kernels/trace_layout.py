"""Operations that move, combine or rescale whole channels; the second half of the table in ``trace_ops``.

``plan_layout`` makes steps of some of these; others run as PyTorch. Packing has to know what they do to
channels. ``rigid`` in the attributes says that the number of channels is written into the model's own code.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dsp_kernels.trace_arguments import Classified, Shapes, argument, flat, source_shape
from dsp_kernels.trace_channels import CHANNEL_RULES

__all__ = ["LAYOUT_KINDS", "classify_function", "classify_module"]

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
