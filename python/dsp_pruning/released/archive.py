"""The graph of a TorchScript archive as plain records. Its forward() is never called.

A TorchScript archive holds code. ``torch.jit.load`` compiles that code and reads the tensors, but runs only
``__setstate__`` methods. An archive with such a method is refused before it is loaded.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.errors import DSPFormatError

_MAX_EXPANSION = 16  # decompressed bytes per byte of the file; archives that torch writes stay below 10


@dataclass(frozen=True)
class Call:
    """One operation, for example ``aten::relu``, with the names of its operands and results.

    value: of a constant, or the attribute that prim::GetAttr reads.
    """

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    value: Any = None


@dataclass(frozen=True)
class Archive:
    """Names of the network itself, its input and its output; its calls in order; its state_dict."""

    network: str
    input: str
    output: str
    calls: tuple[Call, ...]
    state: dict[str, Tensor]


def zip_names(path: str | Path) -> list[str]:
    """Names of the parts of a zip archive; [] for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except Exception:  # zipfile raises many kinds for a damaged file
        return []


def is_torchscript(path: str | Path) -> bool:
    """Whether a file is a zip archive with TorchScript code in it."""
    return any("/code/" in name for name in zip_names(path))


def read_archive(path: str | Path) -> Archive:
    """Raises DSPFormatError for an archive that is damaged, that runs code when it is loaded, that holds
    control flow, or whose network has several inputs or outputs.
    """
    _refuse_code_at_load(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            module = torch.jit.load(str(path), map_location="cpu")
            graph = module.inlined_graph
            state = module.state_dict()
    except Exception as error:  # torch's readers raise RuntimeErrors of many kinds
        raise DSPFormatError(f"{path} is not a readable TorchScript archive: {str(error)[:300]}") from error
    inputs = [value.debugName() for value in graph.inputs()]
    outputs = [value.debugName() for value in graph.outputs()]
    if len(inputs) != 2 or len(outputs) != 1:
        raise DSPFormatError(
            f"{path}: its network takes {len(inputs) - 1} inputs and gives {len(outputs)} outputs; "
            "expected one each"
        )
    return Archive(inputs[0], inputs[1], outputs[0], tuple(_calls(graph, path)), state)


def _calls(graph: Any, path: str | Path) -> Iterator[Call]:
    for node in graph.nodes():
        kind = node.kind()
        if list(node.blocks()):
            raise DSPFormatError(f"{path}: {kind} is control flow; expected the archive of a traced network")
        value = None
        if kind == "prim::Constant":
            value = node.output().toIValue()
        elif kind == "prim::GetAttr":
            value = node.s("name")
        inputs, outputs = (tuple(v.debugName() for v in values()) for values in (node.inputs, node.outputs))
        yield Call(kind, inputs, outputs, value)


def _refuse_code_at_load(path: str | Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            bound = _MAX_EXPANSION * Path(path).stat().st_size + 2**20
            if sum(entry.file_size for entry in entries) > bound:
                raise DSPFormatError(f"{path} would grow beyond {bound} bytes; torch writes no such archive")
            for entry in entries:
                if entry.filename.endswith(".py") and b"__setstate__" in archive.read(entry):
                    raise DSPFormatError(
                        f"{path}: {entry.filename} would run code when it is loaded; traces have none"
                    )
    except (zipfile.BadZipFile, OSError, NotImplementedError, RuntimeError) as error:
        raise DSPFormatError(f"{path} is not a readable TorchScript archive: {error}") from error
