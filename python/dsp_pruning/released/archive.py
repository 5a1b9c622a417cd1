"""The graph of a TorchScript archive. Its forward() is never called.

A TorchScript archive holds code. ``torch.jit.load`` compiles that code and reads the tensors, but runs only
``__setstate__`` methods. An archive with such a method is refused before it is loaded.
"""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.errors import DSPFormatError

_MAX_EXPANSION = 16  # decompressed bytes per byte of the file; archives that torch writes stay below 10


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


def read_archive(path: str | Path) -> tuple[Any, dict[str, Tensor]]:
    """The graph of the network, a ``torch._C.Graph`` of (module, images), and its state dict.

    Raises DSPFormatError for an archive that is damaged, that runs code when it is loaded, or whose network
    has several inputs or outputs.
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
    inputs, outputs = len(list(graph.inputs())) - 1, len(list(graph.outputs()))
    if inputs != 1 or outputs != 1:
        raise DSPFormatError(
            f"{path}: its network takes {inputs} inputs and gives {outputs} outputs; expected one each"
        )
    return graph, state


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
