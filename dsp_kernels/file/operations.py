"""What the graph in a file may hold: functions, methods and modules, each by a name in a fixed table.

A file names entries of these tables and nothing else; a name is never looked up anywhere else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dsp_kernels.graph.size_check import SizeCheck

__all__ = [
    "ATTRIBUTES",
    "METHODS",
    "MODULES",
    "SCALAR_FUNCTIONS",
    "function_name",
    "functions",
]

# Reading one of these is all that getattr may do.
ATTRIBUTES = frozenset({"shape", "dtype", "device", "ndim"})

# They work on numbers and sizes as well as on tensors, so the check of a graph watches their operands.
SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in (
        *("add", "sub", "mul", "truediv", "floordiv", "mod", "neg", "getitem"),
        *("iadd", "isub", "imul", "itruediv", "eq", "ne", "lt", "le", "gt", "ge"),
    )
}

_TORCH = (
    *("abs", "add", "amax", "amin", "bmm", "cat", "channel_shuffle", "chunk", "clamp", "concat", "conv2d"),
    *("conv_transpose2d", "div", "exp", "flatten", "flip", "index_select", "log_softmax", "matmul", "max"),
    *("maximum", "mean", "min", "minimum", "mul", "narrow", "neg", "permute", "pixel_shuffle", "pow"),
    *("relu", "relu_", "reshape", "roll", "rsqrt", "sigmoid", "softmax", "split", "sqrt", "square"),
    *("squeeze", "stack", "sub", "sum", "tanh", "transpose", "true_divide", "unbind", "unsqueeze"),
    *("var_mean", "max_pool2d", "adaptive_avg_pool1d", "where", "gt", "ge", "lt", "le", "logsumexp", "norm"),
    *("clone", "conv1d", "std", "var"),
)
_FUNCTIONAL = (
    *("adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "batch_norm", "celu", "conv2d", "dropout"),
    *("dropout2d", "elu", "feature_dropout", "gelu", "glu", "group_norm", "hardsigmoid", "hardswish"),
    *(
        "hardtanh",
        "instance_norm",
        "interpolate",
        "layer_norm",
        "leaky_relu",
        "linear",
        "local_response_norm",
    ),
    *("log_softmax", "logsigmoid", "lp_pool2d", "max_pool2d", "mish", "normalize", "pad", "pixel_shuffle"),
    *("pixel_unshuffle", "prelu", "relu", "relu6", "relu_", "selu", "sigmoid", "silu", "softmax"),
    *("softplus", "softsign", "tanh", "conv_transpose2d", "threshold", "conv1d", "alpha_dropout"),
    *("hardshrink", "softshrink", "tanhshrink", "softmin"),
)
METHODS = frozenset(
    {
        *("abs", "add", "add_", "amax", "amin", "bmm", "chunk", "clamp", "clamp_", "clone", "contiguous"),
        *("detach", "dim", "div", "div_", "exp", "expand", "expand_as", "flatten", "flip", "float", "half"),
        *("index_select", "log_softmax", "matmul", "max", "mean", "min", "mul", "mul_", "narrow", "neg"),
        *("numel", "permute", "pow", "relu", "relu_", "reshape", "reshape_as", "roll", "rsqrt", "select"),
        *("sigmoid", "sigmoid_", "size", "softmax", "split", "sqrt", "square", "squeeze", "sub", "sub_"),
        *("sum", "t", "tanh", "to", "transpose", "type_as", "unbind", "unflatten", "unsqueeze", "var"),
        *("view", "view_as", "__add__", "__iadd__", "__mul__"),
    }
)

# Class -> the settings that its constructor takes and that it keeps under the same names. "bias" means
# whether there is one.
_CONV = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
    "padding_mode",
)
_TRANSPOSED = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "output_padding", "groups", "bias"),
    *("dilation", "padding_mode"),
)
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode")
_AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
MODULES: Mapping[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: _CONV,
    nn.Conv1d: _CONV,
    nn.ConvTranspose2d: _TRANSPOSED,
    nn.Linear: ("in_features", "out_features", "bias"),
    nn.BatchNorm2d: _BATCH_NORM,
    nn.BatchNorm1d: _BATCH_NORM,
    nn.InstanceNorm2d: _BATCH_NORM,
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.LocalResponseNorm: ("size", "alpha", "beta", "k"),
    nn.MaxPool2d: _MAX_POOL,
    nn.AvgPool2d: _AVG_POOL,
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size", "return_indices"),
    nn.LPPool2d: ("norm_type", "kernel_size", "stride", "ceil_mode"),
    nn.Identity: (),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    nn.Dropout: ("p", "inplace"),
    nn.Dropout2d: ("p", "inplace"),
    nn.AlphaDropout: ("p", "inplace"),
    nn.ReLU: ("inplace",),
    nn.ReLU6: ("inplace",),
    nn.Hardtanh: ("min_val", "max_val", "inplace"),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.PReLU: ("num_parameters",),
    nn.ELU: ("alpha", "inplace"),
    nn.CELU: ("alpha", "inplace"),
    nn.SELU: ("inplace",),
    nn.GELU: ("approximate",),
    nn.SiLU: ("inplace",),
    nn.Mish: ("inplace",),
    nn.Hardshrink: ("lambd",),
    nn.Softshrink: ("lambd",),
    nn.Tanhshrink: (),
    nn.Softsign: (),
    nn.LogSigmoid: (),
    nn.Threshold: ("threshold", "value", "inplace"),
    nn.RReLU: ("lower", "upper", "inplace"),
    nn.GLU: ("dim",),
    nn.Softmax2d: (),
    nn.Sigmoid: (),
    nn.Tanh: (),
    nn.Softplus: ("beta", "threshold"),
    nn.Softmax: ("dim",),
    nn.LogSoftmax: ("dim",),
    nn.Hardswish: ("inplace",),
    nn.Hardsigmoid: ("inplace",),
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners"),
    nn.ZeroPad2d: ("padding",),
    nn.ConstantPad2d: ("padding", "value"),
    nn.ReflectionPad2d: ("padding",),
    nn.ReplicationPad2d: ("padding",),
    nn.CircularPad2d: ("padding",),
    nn.PixelShuffle: ("upscale_factor",),
    nn.PixelUnshuffle: ("downscale_factor",),
    nn.ChannelShuffle: ("groups",),
    SizeCheck: ("conditions",),
}


def _table() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {"getattr": getattr, **SCALAR_FUNCTIONS}
    for prefix, module, names in (("torch", torch, _TORCH), ("torch.nn.functional", F, _FUNCTIONAL)):
        # Versions of torch differ in a few names; one that is not there cannot be in a graph either.
        table.update({f"{prefix}.{name}": getattr(module, name) for name in names if hasattr(module, name)})
    return table


_FUNCTIONS = _table()
_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"


def functions(name: str) -> Callable[..., Any] | None:
    """The function that a file calls ``name``, or None. One of them needs torchvision to be installed."""
    if name == _STOCHASTIC_DEPTH:
        try:
            from torchvision.ops import stochastic_depth
        except ImportError:
            return None
        return stochastic_depth
    return _FUNCTIONS.get(name)


# Python's operators that only make sense of tensors here, as the functions that they call.
_OPERATORS: dict[Any, Callable[..., Any]] = {operator.pow: torch.pow, operator.matmul: torch.matmul}


def function_name(target: Any) -> str | None:
    """What a file calls this function, or None if it may not hold it."""
    target = _OPERATORS.get(target, target)
    for name, function in _FUNCTIONS.items():
        if function is target:
            return name
    if getattr(target, "__name__", "") == "stochastic_depth" and functions(_STOCHASTIC_DEPTH) is target:
        return _STOCHASTIC_DEPTH
    return None
