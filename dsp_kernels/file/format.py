"""The file format: its JSON header, and the names of functions, methods and modules that a file may use.

They are those of the table of operations; a name is looked up in it and nowhere else. docs/guide/files.md
describes the format.
"""

import json
import operator
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.graph.operations.table import FUNCTIONS, OPERATIONS
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d

FORMAT_VERSION = 4  # calls read tensors of modules; 3: several inputs. Others are written as version 2
KEY = "dsp_kernels"  # of the header in the metadata of a safetensors file
FORMAT = "packed model"


def read_header(metadata: Mapping[str, str] | None, path: str | Path) -> dict[str, Any]:
    """The header in the metadata of a safetensors file. Raises DSPFormatError for a foreign or later one."""
    if not metadata or KEY not in metadata:
        raise DSPFormatError(f"{path} is a safetensors file, but not one that dsp_kernels.save wrote")
    try:
        header = json.loads(metadata[KEY])
    except ValueError as error:
        raise DSPFormatError(f"{path}: the description of the model is not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise DSPFormatError(f"{path}: expected the description of a {FORMAT}")
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
CONTAINERS: dict[str, type[nn.Module]] = {t.__name__: t for t in (nn.Module, nn.Sequential, nn.ModuleList)}
# dtypes that an argument may name.
DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool)
}
# All that getattr may read.
ATTRIBUTES = ("device", "dtype", "ndim", "shape")


# Class -> the settings that a file keeps; the constructor's arguments.
MODULES: Mapping[type[nn.Module], tuple[str, ...]] = {
    kind: settings
    for entry in reversed(OPERATIONS)
    for kind, settings in entry.modules.items()
    if kind not in (PackedConv2d, FusedConv2d)
}
# Name in a file -> function. Python's powers and products of numbers could be of any size.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getattr": getattr,
    **{
        re.sub(r"^F\.", "torch.nn.functional.", name): function
        for name, function in FUNCTIONS.items()
        if name not in ("operator.pow", "operator.matmul")
    },
}
# These take numbers and sizes as well as tensors, so check_network watches their operands.
SCALAR_FUNCTIONS = {name: f for name, f in _FUNCTIONS.items() if name.startswith("operator.")}
# An object may have two names (torch.conv2d is F.conv2d): the first is written. Python's operators on tensors
# are written as the functions that they call.
_FUNCTION_NAMES: dict[Any, str] = {
    **{function: name for name, function in reversed(_FUNCTIONS.items())},
    operator.pow: "torch.pow",
    operator.matmul: "torch.matmul",
}
_STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth"


def is_plain(value: Any) -> bool:
    """Whether a setting of a module is a JSON scalar, or a list of at most 64; integers have 31 bits."""
    if isinstance(value, list):
        return len(value) <= 64 and all(is_plain(item) and not isinstance(item, list) for item in value)
    if type(value) is int:
        return abs(value) < 2**31
    return value is None or isinstance(value, bool | float | str)


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
