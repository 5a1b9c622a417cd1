"""Names of architectures that a saved file may hold, and the functions that build them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import nn

from dsp_kernels.errors import DSPFormatError

__all__ = ["build_architecture", "register_architecture"]

# Other packages add theirs with an entry point of this group; a file can only name what is installed.
_ENTRY_POINTS = "dsp_kernels.architectures"
_registered: dict[str, Callable[..., nn.Module]] = {}


def register_architecture(name: str, builder: Callable[..., nn.Module]) -> None:
    """Let files name ``builder``. It gets the JSON arguments that a file holds, so it must check them.

    A model that is to be saved carries ``architecture = {"name": name, "args": {...}}``.
    """
    _registered[name] = builder


def build_architecture(described: Any) -> nn.Module:
    """The dense network of ``{"name": ..., "args": {...}}``, on the meta device: it holds no memory.

    Raises DSPFormatError for a description of another form, an unknown name or arguments that do not fit.
    """
    if not isinstance(described, Mapping) or set(described) != {"name", "args"}:
        raise DSPFormatError(f"architecture is {described!r}; expected its name and args")
    name, arguments = described["name"], described["args"]
    if not isinstance(name, str) or not isinstance(arguments, Mapping):
        raise DSPFormatError(f"architecture is {described!r}; expected a name and a mapping of args")
    builder = _registered.get(name) or _installed(name)
    try:
        with torch.device("meta"):
            return builder(**arguments)
    except Exception as error:  # the builder's own checks, or arguments that it does not have
        raise DSPFormatError(
            f"architecture {name!r} cannot be built from {dict(arguments)}: {error}"
        ) from error


def _installed(name: str) -> Callable[..., nn.Module]:
    known = {point.name: point for point in entry_points(group=_ENTRY_POINTS)}
    if name not in known:
        raise DSPFormatError(
            f"architecture {name!r} is unknown; known are {', '.join(sorted({*known, *_registered}))}. "
            "Others are added with dsp_kernels.register_architecture"
        )
    return known[name].load()
