"""Operations that compute each channel from the same channel: activations, arithmetic and norms."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsp_kernels.graph.operations.entry import Call, Found, TracedNode, flat, zeros_of
from dsp_kernels.op.activations import activate
from dsp_kernels.op.dense import Norm, batch_norm_affine

# -- functions of one tensor: {"apply": the function}


def named(name: str) -> Callable[[Call], Found]:
    """An activation or gate of ``op/activations.py``. Attributes: function, apply."""
    return lambda call: {"function": name, "apply": partial(activate, name=name)}


def gelu(call: Call) -> Found:
    """GELU, exact or by tanh. Attributes: function, apply."""
    return named("gelu" if call.settings(approximate="none")["approximate"] == "none" else "gelu_tanh")(call)


def elementwise(call: Call) -> Found:
    """A function of one tensor, whose other arguments are constants."""
    node, module = call.node, call.module
    if module is not None:
        return {"apply": lambda values: module(values.clone())}
    leaves = flat((node.args, node.kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
    constant = all(leaf is None or isinstance(leaf, bool | int | float | str | fx.Node) for leaf in leaves)
    source = call.traced(tensors[0]) if len(tensors) == 1 else None
    if source is None or source.shape is None or not constant or "out" in node.kwargs:
        return None

    def apply(values: Tensor) -> Tensor:
        args: Any = fx.node.map_arg(node.args, lambda _: values.clone())
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda _: values.clone())
        target: Any = node.target
        if node.op == "call_method":
            return getattr(args[0], target)(*args[1:], **kwargs)
        return target(*args, **kwargs)

    return {"apply": apply}


def with_number(call: Call) -> Found:
    """Arithmetic of a map and a number. Attributes: scale, shift, apply."""
    args, found = call.node.args, elementwise(call)
    if found is None or len(args) != 2 or call.node.kwargs or len(call.output or ()) != 4:
        return None
    forward = isinstance(args[0], fx.Node)
    number, source = (args[1], args[0]) if forward else args
    node, name = call.traced(source), call.target.strip("_").removeprefix("i")
    if node is None or not node.batched or isinstance(number, bool) or not isinstance(number, int | float):
        return None
    if name == "sub":
        return {**found, "scale": 1 if forward else -1, "shift": -number if forward else number}
    if name == "add":
        return {**found, "scale": 1, "shift": number}
    if name == "mul":
        return {**found, "scale": number, "shift": 0}
    return {**found, "scale": 1 / number, "shift": 0} if forward and number else None


def applied(attributes: Mapping[str, Any], values: Sequence[Tensor], frozen: bool) -> Tensor:
    """Constants after a function of one tensor."""
    given = values[0]
    made = attributes["apply"](given).to(given)
    return torch.where(given.isnan() | ~made.isfinite(), torch.nan, made)


def leaky(call: Call) -> Found:
    """x below zero times a slope: a number or a tensor of one per channel. Attributes: slope, operands."""
    source = call.first
    if source is None or not source.batched or len(source.shape or ()) < 2:
        return None
    if isinstance(call.module, nn.LeakyReLU):
        return {"slope": call.module.negative_slope}
    if isinstance(call.module, nn.PReLU):
        return {"slope": call.module.weight}
    if call.target != "prelu":
        return {"slope": call.argument(1, "negative_slope", 0.01)}
    weight = call.traced(call.argument(1, "weight", None))
    if weight is None or weight.value is None or weight.value.numel() not in (1, source.width):
        return None
    several = weight.value.numel() > 1
    return {"slope": weight.value, "operands": (source.name, weight.name) if several else (source.name,)}


def leaky_per_channel(call: Call) -> Found:
    """The same with more than one slope."""
    return leaky(call) if getattr(call.module, "num_parameters", 1) > 1 else None


def leaked(attributes: Mapping[str, Any], values: Sequence[Tensor], frozen: bool) -> Tensor:
    """Constants after ``leaky``."""
    given, slope = values[0], attributes["slope"]
    if isinstance(slope, Tensor):
        slope = slope.detach().cpu().double() if frozen else torch.nan
    return torch.where((given > 0) | (given == 0), given, given * slope)


# -- functions of two tensors: {"operands": their names, "operation": the operation}


def sum_of_equals(call: Call) -> Found:
    """x + y of one shape, the batch first in both."""
    if len(call.node.args) != 2 or call.node.kwargs.get("alpha", 1) != 1 or "out" in call.node.kwargs:
        return None
    left, right = map(call.traced, call.node.args)
    # A parameter has no batch dimension, even if the example's batch size makes it look like one.
    if left is None or right is None or not (left.batched and right.batched):
        return None
    equal = left.shape is not None and left.shape == right.shape
    return {"operands": (left.name, right.name), "operation": "add"} if equal else None


def combination(operation: str) -> Callable[[Call], Found]:
    """Of two tensors with as many channels, which may broadcast over the map or be parameters."""

    def attributes(call: Call) -> Found:
        if len(call.node.args) != 2 or call.node.kwargs or call.output is None:
            return None
        left, right = map(call.traced, call.node.args)
        if left is None or right is None or left.width != right.width or not left.width:
            return None
        if _channel_from_end(left) != _channel_from_end(right):
            return None
        return {"operation": operation, "operands": (left.name, right.name)}

    return attributes


def _channel_from_end(node: TracedNode) -> int:
    return len(node.shape or ()) - node.axis


def combined(attributes: Mapping[str, Any], values: Sequence[Tensor], frozen: bool) -> Tensor:
    """Constants of two tensors combined."""
    left, right = values
    if attributes["operation"] == "multiply":
        return torch.where((left == 0) | (right == 0), 0.0, left * right)
    return left - right if attributes["operation"] == "subtract" else left + right


# -- norms


_TENSORS = ("running_mean", "running_var", "weight", "bias")
BATCH_NORM_ARGUMENTS = ("input", *_TENSORS, "training", "momentum", "eps")  # of F.batch_norm


def batch_norm(call: Call) -> Found:
    """Attributes: norm (a Norm or module), whether the pruner can clear a channel, operands."""
    module = call.module
    if isinstance(module, nn.BatchNorm2d):
        fits = call.is_map and module.running_mean is not None
        pair = module.weight, module.bias
        clearable = all(tensor is not None and tensor.requires_grad for tensor in pair)
        return {"norm": module, "clearable": clearable} if fits else None
    given = dict(zip(BATCH_NORM_ARGUMENTS, call.node.args, strict=False)) | call.node.kwargs
    tensors = [call.traced(given.get(name)) for name in _TENSORS]
    present = [node for node in tensors if node is not None]
    if not call.is_map or call.first is None or given.get("training", False) is not False:
        return None
    if None in tensors[:2] or any(node.value is None for node in present):
        return None
    values: Any = (None if node is None else node.value for node in tensors)
    norm = Norm._make((*values, given.get("eps", 1e-5)))
    operands = (call.first.name, *(node.name for node in present))
    return {"norm": norm, "clearable": False, "operands": operands}


def normalised(attributes: Mapping[str, Any], values: Sequence[Tensor], frozen: bool) -> Tensor:
    """Constants after a batch norm."""
    if not frozen:
        return zeros_of(values[0]) if attributes["clearable"] else torch.full_like(values[0], torch.nan)
    scale, shift = (part.cpu() for part in batch_norm_affine(attributes["norm"]))
    return torch.where(scale == 0, shift, values[0] * scale + shift)


def instance_norm(call: Call) -> Found:
    """A norm of every channel of every image by itself. Attributes: norm."""
    norm = call.module
    single = not isinstance(norm, nn.GroupNorm) or norm.num_groups == norm.num_channels
    return {"norm": norm} if call.is_map and single else None


def normalised_by_image(attributes: Mapping[str, Any], values: Sequence[Tensor], frozen: bool) -> Tensor:
    """Constants after an instance norm."""
    norm = attributes["norm"]
    if not frozen:
        return torch.full_like(values[0], torch.nan)
    if getattr(norm, "running_mean", None) is not None:
        return normalised({"norm": norm}, values, frozen)
    if norm.weight is None:
        return zeros_of(values[0])
    # Zeros have mean and variance 0.
    constant = (values[0] == 0) | (norm.weight.detach().cpu() == 0)
    return torch.where(constant, norm.bias.detach().cpu().double(), torch.nan)
