"""The header of a saved file: its JSON description, and its table of tensors before one is read."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dsp_kernels.errors import DSPFormatError

__all__ = [
    "FORMAT_VERSION",
    "KEY",
    "TensorTable",
    "check_tensors",
    "new_header",
    "other_kind",
    "read_header",
    "tensor_table",
]

FORMAT_VERSION = 3  # version 3: several inputs; a network of one input is still written as version 2
KEY = "dsp_kernels"
_FORMAT = "packed model"
_FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_DTYPES = {**_FLOATS, "I64": torch.int64}

TensorTable = dict[str, tuple[tuple[int, ...], torch.dtype]]


def new_header(version: int, **parts: Any) -> dict[str, Any]:
    """A header of our format.

    readable_from: the least version that a reader has to know. A later version that only adds what an older
    reader may ignore keeps it, and older readers go on reading its files.
    """
    return {"format": _FORMAT, "version": version, "readable_from": version, **parts}


def read_header(metadata: Mapping[str, str] | None, path: str | Path) -> dict[str, Any]:
    """The checked header of a safetensors file's metadata. Raises DSPFormatError for another one."""
    if not metadata or KEY not in metadata:
        raise DSPFormatError(f"{path} is a safetensors file, but not one that dsp_kernels.save wrote")
    try:
        header = json.loads(metadata[KEY])
    except ValueError as error:
        raise DSPFormatError(f"{path}: the description of the model is not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise DSPFormatError(f"{path}: expected the description of a {_FORMAT}")
    version = header.get("version")
    least = header.get("readable_from", version)
    numbers: list[Any] = [version, least]
    for number in numbers:
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise DSPFormatError(
                f"{path} has version {version!r}, readable from {least!r}; expected whole numbers"
            )
    if version == 1:
        raise DSPFormatError(
            f"{path} has version 1, which is no longer read; write the network again with a current "
            "dsp_kernels"
        )
    if numbers[1] > FORMAT_VERSION:
        raise DSPFormatError(
            f"{path} has version {version}, for readers of version {least} and later; this dsp_kernels reads "
            f"version {FORMAT_VERSION}. Install a later one"
        )
    return header


def other_kind(path: str | Path) -> str:
    """What else a file that is no safetensors file looks like, in brackets; empty if nothing known."""
    if zipfile.is_zipfile(path):
        return " (it is a zip archive, as of torch.save or numpy; dsp_kernels.save writes what load reads)"
    return " (ONNX is only written)" if Path(path).suffix == ".onnx" else ""


def tensor_table(file: Any, path: str | Path) -> TensorTable:
    """Name -> shape and dtype of every tensor of an open file; none is read."""
    table: TensorTable = {}
    for name in file.keys():  # noqa: SIM118  # not a dict
        part = file.get_slice(name)
        dtype = part.get_dtype()
        if dtype not in _DTYPES:
            raise DSPFormatError(
                f"{path}: tensor {name!r} has dtype {dtype}; expected one of {', '.join(_DTYPES)}"
            )
        table[name] = tuple(part.get_shape()), _DTYPES[dtype]
    return table


def check_tensors(model: nn.Module, table: TensorTable, path: str | Path) -> None:
    """Names, shapes and dtypes of a file's tensors against the model that they are for."""
    expected = model.state_dict()
    if set(table) != set(expected):
        missing, foreign = sorted(set(expected) - set(table))[:3], sorted(set(table) - set(expected))[:3]
        raise DSPFormatError(f"{path}: tensors missing: {missing}; not of this model: {foreign}")
    floats = set()
    for name, tensor in expected.items():
        shape, dtype = table[name]
        if shape != tuple(tensor.shape):
            raise DSPFormatError(
                f"{path}: tensor {name!r} has shape {list(shape)}; expected {list(tensor.shape)}"
            )
        if dtype.is_floating_point:
            floats.add(str(dtype).removeprefix("torch."))
        if dtype.is_floating_point != tensor.is_floating_point():
            raise DSPFormatError(
                f"{path}: tensor {name!r} has dtype {dtype}; expected a dtype like {tensor.dtype}"
            )
    if len(floats) > 1:
        raise DSPFormatError(f"{path}: tensors of several floating dtypes: {', '.join(sorted(floats))}")
