"""The file format: its JSON header, and the names of functions, methods and modules that a file may use.

A name is looked up in the tables here and nowhere else. docs/guide/files.md describes the format.
"""

import json
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.graph.size_check import SizeCheck

FORMAT_VERSION = 3  # several inputs; a network of one input is written as version 2
KEY = "dsp_kernels"  # of the header in the metadata of a safetensors file
_FORMAT = "packed model"


def new_header(version: int, **parts: Any) -> dict[str, Any]:
    """A header of this version.

    readable_from: the oldest version of a reader that understands the file. A later version that only adds
    keys keeps it, so older readers still read its files.
    """
    return {"format": _FORMAT, "version": version, "readable_from": version, **parts}


def read_header(metadata: Mapping[str, str] | None, path: str | Path) -> dict[str, Any]:
    """The header in the metadata of a safetensors file. Raises DSPFormatError for a foreign or later one."""
    if not metadata or KEY not in metadata:
        raise DSPFormatError(f"{path} is a safetensors file, but not one that dsp_kernels.save wrote")
    try:
        header = json.loads(metadata[KEY])
    except ValueError as error:
        raise DSPFormatError(f"{path}: the description of the model is not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise DSPFormatError(f"{path}: expected the description of a {_FORMAT}")
    version = header.get("version")
    oldest: Any = header.get("readable_from", version)
    if not all(type(number) is int and number >= 1 for number in (version, oldest)):
        raise DSPFormatError(
            f"{path} has version {version!r}, readable from {oldest!r}; expected whole numbers"
        )
    if version == 1:
        raise DSPFormatError(
            f"{path} has version 1, which is no longer read; save its network with a current dsp_kernels"
        )
    if oldest > FORMAT_VERSION:
        raise DSPFormatError(
            f"{path} has version {version}, for readers of version {oldest} and later; this dsp_kernels "
            f"reads version {FORMAT_VERSION}. Install a later one"
        )
    return header


# The attribute of the network that a call may read besides its tensors: whether it is in training mode.
TRAINING = "training"
# Modules that only hold others; a file keeps them for the names and the order of the state dict.
CONTAINERS: dict[str, type[nn.Module]] = {
    kind.__name__: kind for kind in (nn.Module, nn.Sequential, nn.ModuleList)
}
# dtypes that an argument may name.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool)
}
# All that getattr may read.
ATTRIBUTES = ("device", "dtype", "ndim", "shape")


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# These take numbers and sizes as well as tensors, so check_network watches their operands.
SCALAR_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"operator.{name}": getattr(operator, name)
    for name in _names(
        "add sub mul truediv floordiv mod neg getitem iadd isub imul itruediv eq ne lt le gt ge"
    )
}
_TORCH = _names(
    """
    abs adaptive_avg_pool1d add amax amin bmm cat channel_shuffle chunk clamp clone concat conv1d conv2d
    conv_transpose2d div exp flatten flip ge gt index_select le log_softmax logsumexp lt matmul max
    max_pool2d maximum mean min minimum mul narrow neg norm permute pixel_shuffle pow relu relu_ reshape
    roll rsqrt sigmoid softmax split sqrt square squeeze stack std sub sum tanh transpose true_divide unbind
    unsqueeze var var_mean where
    """
)
_FUNCTIONAL = _names(
    """
    adaptive_avg_pool2d adaptive_max_pool2d alpha_dropout avg_pool2d batch_norm celu conv1d conv2d
    conv_transpose2d dropout dropout2d elu feature_dropout gelu glu group_norm hardshrink hardsigmoid
    hardswish hardtanh instance_norm interpolate layer_norm leaky_relu linear local_response_norm
    log_softmax logsigmoid lp_pool2d max_pool2d mish normalize pad pixel_shuffle pixel_unshuffle prelu relu
    relu6 relu_ selu sigmoid silu softmax softmin softplus softshrink softsign tanh tanhshrink threshold
    """
)
METHODS = _names(
    """
    __add__ __iadd__ __mul__ abs add add_ amax amin bmm chunk clamp clamp_ clone contiguous detach dim div
    div_ exp expand expand_as flatten flip float half index_select log_softmax matmul max mean min mul mul_
    narrow neg numel permute pow relu relu_ reshape reshape_as roll rsqrt select sigmoid sigmoid_ size
    softmax split sqrt square squeeze sub sub_ sum t tanh to transpose type_as unbind unflatten unsqueeze
    var view view_as
    """
)

CONV_SETTINGS = ("kernel_size", "stride", "padding", "dilation")
_CONV = (*CONV_SETTINGS, "in_channels", "out_channels", "groups", "bias", "padding_mode")
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_MAX_POOL = (*CONV_SETTINGS, "return_indices", "ceil_mode")
_AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
# Class -> the arguments of its constructor, which its modules keep as attributes of the same names. "bias"
# means whether there is one.
MODULES: Mapping[type[nn.Module], tuple[str, ...]] = {
    **dict.fromkeys((nn.Conv2d, nn.Conv1d), _CONV),
    nn.ConvTranspose2d: (*_CONV, "output_padding"),
    nn.Linear: ("in_features", "out_features", "bias"),
    **dict.fromkeys((nn.BatchNorm2d, nn.BatchNorm1d, nn.InstanceNorm2d), _BATCH_NORM),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", "bias"),
    nn.LocalResponseNorm: ("size", "alpha", "beta", "k"),
    nn.MaxPool2d: _MAX_POOL,
    nn.AvgPool2d: _AVG_POOL,
    nn.AdaptiveAvgPool2d: ("output_size",),
    nn.AdaptiveMaxPool2d: ("output_size", "return_indices"),
    nn.LPPool2d: ("norm_type", "kernel_size", "stride", "ceil_mode"),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.Unflatten: ("dim", "unflattened_size"),
    **dict.fromkeys((nn.Dropout, nn.Dropout2d, nn.AlphaDropout), ("p", "inplace")),
    **dict.fromkeys(
        (nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Mish, nn.Hardswish, nn.Hardsigmoid), ("inplace",)
    ),
    **dict.fromkeys((nn.Identity, nn.Tanhshrink, nn.Softsign, nn.LogSigmoid, nn.Sigmoid, nn.Tanh), ()),
    nn.Softmax2d: (),
    nn.Hardtanh: ("min_val", "max_val", "inplace"),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.PReLU: ("num_parameters",),
    **dict.fromkeys((nn.ELU, nn.CELU), ("alpha", "inplace")),
    nn.GELU: ("approximate",),
    **dict.fromkeys((nn.Hardshrink, nn.Softshrink), ("lambd",)),
    nn.Threshold: ("threshold", "value", "inplace"),
    nn.RReLU: ("lower", "upper", "inplace"),
    **dict.fromkeys((nn.GLU, nn.Softmax, nn.LogSoftmax), ("dim",)),
    nn.Softplus: ("beta", "threshold"),
    nn.Upsample: ("size", "scale_factor", "mode", "align_corners"),
    **dict.fromkeys((nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d), ("padding",)),
    nn.ConstantPad2d: ("padding", "value"),
    nn.PixelShuffle: ("upscale_factor",),
    nn.PixelUnshuffle: ("downscale_factor",),
    nn.ChannelShuffle: ("groups",),
    SizeCheck: ("conditions",),
}


def is_plain(value: Any) -> bool:
    """Whether a setting of a module is a JSON scalar, or a list of at most 64; integers have 31 bits."""
    if isinstance(value, list):
        return len(value) <= 64 and all(is_plain(item) and not isinstance(item, list) for item in value)
    if type(value) is int:
        return abs(value) < 2**31
    return value is None or isinstance(value, bool | float | str)


# Versions of torch differ in a few names; a graph can only hold those that exist.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    **SCALAR_FUNCTIONS,
    **{f"torch.{name}": getattr(torch, name) for name in sorted(_TORCH) if hasattr(torch, name)},
    **{f"torch.nn.functional.{name}": getattr(F, name) for name in sorted(_FUNCTIONAL) if hasattr(F, name)},
}
# An object may have two names (torch.conv2d is F.conv2d): the first is written. Python's operators on tensors
# are written as the functions that they call.
_FUNCTION_NAMES: dict[Any, str] = {
    **{function: name for name, function in reversed(_FUNCTIONS.items())},
    operator.pow: "torch.pow",
    operator.matmul: "torch.matmul",
}
_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"


def functions(name: str) -> Callable[..., Any] | None:
    """The function that a file calls ``name``, or None. One of them needs torchvision."""
    if name == _STOCHASTIC_DEPTH:
        try:
            from torchvision.ops import stochastic_depth
        except ImportError:
            return None
        return stochastic_depth
    return _FUNCTIONS.get(name)


def function_name(target: Any) -> str | None:
    """The name of a function in a file, or None if a file cannot hold it."""
    if getattr(target, "__name__", "") == "stochastic_depth" and functions(_STOCHASTIC_DEPTH) is target:
        return _STOCHASTIC_DEPTH
    return _FUNCTION_NAMES.get(target)
