"""The one table of operations that a traced network may hold, and how each is recognised.

Every way of writing an operation (module, function, method) becomes one kind with one set of attributes.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dsp_kernels.fused_conv import FusedConv2d
from dsp_kernels.packed import PackedConv2d
from dsp_kernels.size_check import SizeCheck
from dsp_kernels.trace_layout import LAYOUT_KINDS, classify_function, classify_module

__all__ = ["KINDS", "LEAF_TYPES", "classify"]

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
