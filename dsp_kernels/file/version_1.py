"""Version 1 of the file: a known architecture by name, and per module what packing changed in it.

It is still read, and written for a network of a registered architecture that torch.fx cannot trace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from dsp_kernels.architectures import build_architecture
from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.file.modules import Budget
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.op.structure import GroupStructure

__all__ = ["build_changed", "encode_changes"]


def encode_changes(model: nn.Module) -> dict[str, Any]:
    """{"architecture", "modules"}. Raises DSPFormatError if more differs than packing changes."""
    architecture = getattr(model, "architecture", None)
    return {"architecture": architecture, "modules": _changes(build_architecture(architecture), model)}


def build_changed(header: Mapping[str, Any], budget: Budget) -> nn.Module:
    """The network that ``encode_changes`` describes, on the meta device."""
    if not isinstance(header.get("modules"), dict) or "architecture" not in header:
        raise DSPFormatError("the description has no architecture or no modules")
    model = build_architecture(header["architecture"])
    for path, change in header["modules"].items():
        try:
            made = _changed(model.get_submodule(path), change, path, budget)
        except (AttributeError, KeyError, TypeError, DSPError) as error:
            raise DSPFormatError(f"layer {path!r} cannot be made from its description: {error}") from error
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made)
    return model


def _changes(dense: nn.Module, packed: nn.Module) -> dict[str, dict[str, Any]]:
    """Module path -> what packing changed there."""
    changes: dict[str, dict[str, Any]] = {}
    dense_modules = dict(dense.named_modules())
    for path, module in packed.named_modules():
        original = dense_modules.get(path)
        if isinstance(module, PackedConv2d) and isinstance(original, nn.Conv2d):
            changes[path] = {
                "type": "packed_conv",
                "structure": module.structure.to_dict(),
                "bias": module.bias is not None,
            }
        elif isinstance(module, nn.BatchNorm2d) and isinstance(original, nn.BatchNorm2d):
            if module.num_features != original.num_features:
                changes[path] = {"type": "batch_norm", "channels": module.num_features}
        elif isinstance(module, nn.Linear) and isinstance(original, nn.Linear):
            if module.out_features != original.out_features:
                raise DSPFormatError(
                    f"layer {path!r} has {module.out_features} outputs; expected {original.out_features}"
                )
            if module.in_features != original.in_features:
                changes[path] = {"type": "linear", "features": module.in_features}
        elif type(module) is not type(original) and not isinstance(module, nn.ParameterList):
            raise DSPFormatError(
                f"layer {path!r} is {type(module).__name__}; the architecture has {type(original).__name__} "
                "there, and packing changes only convolutions, batch norms and linear layers"
            )
    return changes


def _changed(module: nn.Module, change: Mapping[str, Any], path: str, budget: Budget) -> nn.Module:
    """The module after packing, on the meta device. Packing only removes, which bounds every size."""
    kind = change["type"]
    if kind == "packed_conv" and isinstance(module, nn.Conv2d) and not isinstance(module.padding, str):
        budget.spend(change["structure"], path)
        structure = GroupStructure.from_dict(change["structure"])
        _at_most(structure.in_channels, module.in_channels, "in_channels")
        _at_most(structure.out_channels, module.out_channels, "out_channels")
        settings = (module.kernel_size, module.stride, module.padding, module.dilation)
        return PackedConv2d(structure, *settings, bias=bool(change["bias"]), device="meta")
    if kind == "batch_norm" and isinstance(module, nn.BatchNorm2d):
        channels = _at_most(change["channels"], module.num_features, "channels")
        return nn.BatchNorm2d(channels, module.eps, module.momentum, module.affine, device="meta")
    if kind == "linear" and isinstance(module, nn.Linear):
        features = _at_most(change["features"], module.in_features, "features")
        return nn.Linear(features, module.out_features, module.bias is not None, device="meta")
    raise DSPFormatError(f"a {type(module).__name__} cannot become {kind!r}")


def _at_most(value: Any, bound: int, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= bound:
        raise DSPFormatError(f"{what} is {value!r}; expected 1 to {bound}")
    return value
