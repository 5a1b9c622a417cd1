"""save / load of packed models: tensors in safetensors, structures in its JSON header, no pickle.

Version 1: a known architecture, and per module what packing changed in it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsp_kernels.architectures import build_architecture
from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.packed import PackedConv2d
from dsp_kernels.structure import GroupStructure

__all__ = ["FORMAT_VERSION", "load", "save"]

FORMAT_VERSION = 1
_KEY = "dsp_kernels"
_FORMAT = "packed model"


def save(model: nn.Module, path: str | Path) -> None:
    """Write a packed model. It is complete under ``path`` or not there at all.

    The model has to carry ``architecture`` (see ``register_architecture``), as those of dsp_pruning do.
    Raises DSPFormatError if it has none, or differs from it in more than packing changes.
    """
    architecture = getattr(model, "architecture", None)
    if architecture is None:
        raise DSPFormatError(
            f"{type(model).__name__} carries no architecture, so a file could not be loaded again; set "
            'model.architecture = {"name": ..., "args": {...}} and register_architecture(name, builder)'
        )
    changes = _changes(build_architecture(architecture), model)
    header = {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        "architecture": architecture,
        "modules": changes,
    }
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()
    }
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid4().hex}")
    try:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})
        os.replace(temporary, target)  # noqa: PTH105  # Path.replace would do the same; this is the habit
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The packed model in a file that ``save`` wrote, in eval mode. Executes nothing from the file.

    Everything is checked before memory is taken: a structure against its architecture, every tensor's
    shape and dtype against the module that gets it.
    Raises DSPFormatError for a file that is truncated, foreign, of another version or contradicts itself.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = _header(file.metadata(), path)
            model = build_architecture(header["architecture"])
            _apply_changes(model, header["modules"])
            _check_tensors(model, file, path)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (SafetensorError, OSError, RecursionError) as error:
        raise DSPFormatError(f"{path} is not a readable safetensors file: {error}") from error
    model.load_state_dict(tensors, assign=True)
    for module in model.modules():
        if isinstance(module, PackedConv2d):
            module.reset_index("cpu")
    return model.to(device).eval()


def _header(metadata: Mapping[str, str] | None, path: str | Path) -> dict[str, Any]:
    if not metadata or _KEY not in metadata:
        raise DSPFormatError(f"{path} is a safetensors file, but not one that dsp_kernels.save wrote")
    try:
        header = json.loads(metadata[_KEY])
    except ValueError as error:
        raise DSPFormatError(f"{path}: the description of the model is not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != _FORMAT:
        raise DSPFormatError(f"{path}: expected the description of a {_FORMAT}")
    if header.get("version") != FORMAT_VERSION:
        raise DSPFormatError(
            f"{path} has version {header.get('version')!r}; this dsp_kernels reads version {FORMAT_VERSION}"
        )
    if not isinstance(header.get("modules"), dict) or "architecture" not in header:
        raise DSPFormatError(f"{path}: the description has no architecture or no modules")
    return header


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
            if module.in_features != original.in_features:
                changes[path] = {"type": "linear", "features": module.in_features}
        elif type(module) is not type(original) and not isinstance(module, nn.ParameterList):
            raise DSPFormatError(
                f"layer {path!r} is {type(module).__name__}; the architecture has {type(original).__name__} "
                "there, and packing changes only convolutions, batch norms and linear layers"
            )
    return changes


def _apply_changes(model: nn.Module, changes: Mapping[str, Any]) -> None:
    for path, change in changes.items():
        try:
            module = model.get_submodule(path)
            made = _changed(module, change)
        except (AttributeError, KeyError, TypeError, DSPError) as error:
            raise DSPFormatError(f"layer {path!r} cannot be made from its description: {error}") from error
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made)


def _changed(module: nn.Module, change: Mapping[str, Any]) -> nn.Module:
    """The module after packing, on the meta device. Packing only removes, which bounds every size."""
    kind = change["type"]
    if kind == "packed_conv" and isinstance(module, nn.Conv2d) and not isinstance(module.padding, str):
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


def _check_tensors(model: nn.Module, file: Any, path: str | Path) -> None:
    """Names, shapes and dtypes of a file's tensors against the model that they are for."""
    expected = model.state_dict()
    found = set(file.keys())
    if found != set(expected):
        missing, foreign = sorted(set(expected) - found)[:3], sorted(found - set(expected))[:3]
        raise DSPFormatError(f"{path}: tensors missing: {missing}; not of this model: {foreign}")
    floats = set()
    for name, tensor in expected.items():
        part = file.get_slice(name)
        if list(part.get_shape()) != list(tensor.shape):
            raise DSPFormatError(
                f"{path}: tensor {name!r} has shape {part.get_shape()}; expected {list(tensor.shape)}"
            )
        dtype = part.get_dtype()
        if tensor.is_floating_point():
            floats.add(dtype)
        if (dtype in _FLOATS) != tensor.is_floating_point() or (dtype not in _FLOATS and dtype != "I64"):
            raise DSPFormatError(f"{path}: tensor {name!r} has dtype {dtype}; expected {_kind(tensor)}")
    if len(floats) > 1:
        raise DSPFormatError(f"{path}: tensors of several floating dtypes: {', '.join(sorted(floats))}")


_FLOATS = ("F64", "F32", "F16", "BF16")


def _kind(tensor: Tensor) -> str:
    return f"one of {', '.join(_FLOATS)}" if tensor.is_floating_point() else "I64"
