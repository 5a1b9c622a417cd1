"""Modules of a graph file as data: a class name from a fixed table and the settings of its constructor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.file.operations import MODULES
from dsp_kernels.op.activations import ACTIVATIONS
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import GroupStructure

__all__ = ["Budget", "build_module", "encode_module", "is_known"]

_BY_NAME = {kind.__name__: kind for kind in MODULES}
_OURS = (PackedConv2d, FusedConv2d)
_LARGEST = 2**31  # of any integer setting
# Settings that some versions of a class keep under another name or not at all.
_CONV_SETTINGS = ("kernel_size", "stride", "padding", "dilation")


@dataclass
class Budget:
    """What the packed convolutions of a file may cost before any of its tensors is read.

    widths: channels that their structures may have in all; tensors: groups that they may have.
    Absent channels take no byte in a file, so their number has to be bounded by the size of the file.
    """

    widths: int
    tensors: int

    def spend(self, structure: Mapping[str, Any], path: str) -> None:
        """Raises DSPFormatError where a structure, still unchecked JSON, is too large for its file."""
        groups = structure.get("groups") if isinstance(structure, Mapping) else None
        if not isinstance(groups, list):
            raise DSPFormatError(f"layer {path!r} has no group structure")
        for name in ("in_channels", "out_channels"):
            width = structure.get(name)
            if not isinstance(width, int) or isinstance(width, bool) or not 1 <= width <= self.widths:
                raise DSPFormatError(
                    f"layer {path!r}: {name} is {width!r}; expected 1 to {self.widths} in a file of this size"
                )
            self.widths -= width
        self.tensors -= len(groups)
        if self.tensors < 0:
            raise DSPFormatError(f"layer {path!r}: the file has more groups than tensors")


def is_known(module: nn.Module) -> bool:
    """Whether a file can hold this module as one."""
    return type(module) in MODULES or type(module) in _OURS


def encode_module(module: nn.Module, path: str) -> dict[str, Any]:
    """{"class": name, setting: value, ...} of plain JSON values. Raises DSPFormatError for other modules."""
    if isinstance(module, PackedConv2d) and type(module) is PackedConv2d:
        settings: dict[str, Any] = {name: list(getattr(module, name)) for name in _CONV_SETTINGS}
        return {
            "class": "PackedConv2d",
            "structure": module.structure.to_dict(),
            **settings,
            "bias": module.bias is not None,
        }
    if isinstance(module, FusedConv2d) and type(module) is FusedConv2d:
        spec = module.spec
        settings = {name: list(getattr(spec, name)) for name in _CONV_SETTINGS}
        return {
            "class": "FusedConv2d",
            "structure": spec.structure.to_dict(),
            **settings,
            "activation": spec.activation,
            "bias": module.bias is not None,
            "backend": module.backend,
        }
    if type(module) not in MODULES:
        raise DSPFormatError(
            f"layer {path!r} is a {type(module).__module__}.{type(module).__name__}, which a file cannot hold"
        )
    encoded: dict[str, Any] = {"class": type(module).__name__}
    for name in MODULES[type(module)]:
        value = getattr(module, name)
        if name == "bias":
            value = value is not None
        encoded[name] = list(value) if isinstance(value, tuple) else value
        if not _is_plain(encoded[name]):
            raise DSPFormatError(f"layer {path!r}: {name} is {value!r}, which a file cannot hold")
    return encoded


def build_module(described: Any, path: str, budget: Budget) -> nn.Module:
    """The module of ``encode_module``, on the meta device. Raises DSPFormatError for anything else."""
    if not isinstance(described, Mapping) or not isinstance(described.get("class"), str):
        raise DSPFormatError(f"layer {path!r} has no class")
    settings = dict(described)
    name = settings.pop("class")
    for setting, value in settings.items():
        if setting != "structure" and not _is_plain(value):
            raise DSPFormatError(f"layer {path!r}: {setting} is {str(value)[:80]}; no {name} has that")
    try:
        with torch.device("meta"):
            if name in ("PackedConv2d", "FusedConv2d"):
                budget.spend(settings.get("structure", {}), path)
                structure = GroupStructure.from_dict(settings.pop("structure"))
                return _packed(structure, settings) if name == "PackedConv2d" else _fused(structure, settings)
            if name not in _BY_NAME:
                raise DSPFormatError(f"class {name!r} is unknown")
            kind = _BY_NAME[name]
            _only(settings, MODULES[kind])
            return kind(**{key: _tuples(value) for key, value in settings.items()})
    except (DSPError, TypeError, ValueError, RuntimeError, AssertionError, OverflowError) as error:
        raise DSPFormatError(f"layer {path!r} cannot be made from its description: {error}") from error


def _packed(structure: GroupStructure, settings: dict[str, Any]) -> PackedConv2d:
    _only(settings, (*_CONV_SETTINGS, "bias"))
    return PackedConv2d(structure, **settings, device="meta")


def _fused(structure: GroupStructure, settings: dict[str, Any]) -> FusedConv2d:
    _only(settings, (*_CONV_SETTINGS, "bias", "activation", "backend"))
    if settings["activation"] not in ACTIVATIONS:
        raise DSPFormatError(f"activation is {settings['activation']!r}; expected {', '.join(ACTIVATIONS)}")
    spec = ConvSpec(structure, *(settings[name] for name in (*_CONV_SETTINGS, "activation")))
    weights = [torch.empty(len(g.out_index), len(g.in_index), *spec.kernel_size) for g in structure.groups]
    bias = torch.empty(structure.out_channels) if settings["bias"] else None
    return FusedConv2d(spec, weights, bias, settings["backend"])


def _only(settings: Mapping[str, Any], allowed: tuple[str, ...]) -> None:
    if set(settings) != set(allowed):
        raise DSPFormatError(f"its settings are {sorted(settings)}; expected {sorted(allowed)}")


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= 64 and all(_is_plain(item) and not isinstance(item, list) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < _LARGEST
    return value is None or isinstance(value, bool | float | str)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
