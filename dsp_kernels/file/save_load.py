"""save / load of packed models: tensors in safetensors, the network in its JSON header, no pickle, no code.

Version 2 holds a network of one input, version 3 one of several. docs/files.md describes the format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.check import check_network, is_example_shape, is_input_shape
from dsp_kernels.file.decode import LoadedNetwork, build_network
from dsp_kernels.file.encode import encode_network
from dsp_kernels.file.header import (
    FORMAT_VERSION,
    KEY,
    check_tensors,
    new_header,
    other_kind,
    read_header,
    tensor_table,
)
from dsp_kernels.file.modules import Budget
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.program.fuse import FusedNetwork
from dsp_kernels.whole_file import require_file, whole_file

__all__ = ["FORMAT_VERSION", "input_channels", "load", "save"]

# A structure may have absent channels, which take no byte; so many are allowed in a file of any size.
_FREE_WIDTHS = 2**20
# Tried in turn where no example is given: small images, MNIST, ImageNet, Inception.
_USUAL_SIZES = (32, 28, 224, 299, 16, 8)


def save(model: nn.Module, path: str | Path, example_input: Example | None = None) -> None:
    """Write a packed model with its architecture. It is complete under ``path`` or not there at all.

    example_input: (batch, channels, height, width) of the size that the network is made for. ``load`` gives
    its shape back and checks the network with it; without one the first usual size that fits stands in. A
    tuple of tensors of one floating dtype, the image first, for a network of several inputs (version 3).

    The file holds a graph of known operations and modules (version 2). Where torch.fx cannot follow a model,
    torch.export may, with an example; the file then runs in eval mode only.
    Raises DSPFormatError, naming it, for a model with something that a file cannot hold.
    """
    if isinstance(model, FusedNetwork):
        raise DSPFormatError("a fused network holds no parameters: save the packed one that it was made from")
    tensors = {
        name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()
    }
    header = _describe(model, tensors, example_input)
    try:
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={KEY: json.dumps(header)})
    except SafetensorError as error:  # what it makes of a full disk
        raise OSError(f"cannot write {path}: {error}") from error


def load(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The packed model in a file that ``save`` wrote, in eval mode. Executes no code from the file.

    The network is made of operations and modules out of fixed tables, first without memory: every tensor's
    shape and dtype is compared with the module that gets it, and the calls are run on the meta device,
    before a tensor is read.
    Raises DSPFormatError for a file that is truncated, foreign, of another version or contradicts itself.
    """
    require_file(path)
    # The network outlives the caller's modes: it has to be trainable.
    with torch.inference_mode(False):
        return _load(path).to(device).eval()


def _load(path: str | Path) -> nn.Module:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = read_header(file.metadata(), path)
            table = tensor_table(file, path)
            budget = Budget(Path(path).stat().st_size + _FREE_WIDTHS, len(table))
            model = _network(header, table, budget)
            check_tensors(model, table, path)
            _check_ties(model, header.get("tied", {}))
            check_network(model.eval(), model.example_shapes, _floating(table))
            # Copies: what safetensors gives is the file itself in memory, which another process may change.
            tensors = {name: file.get_tensor(name).clone() for name in table}
    except (SafetensorError, OSError, RecursionError) as error:
        what = f"is not a readable safetensors file{other_kind(path)}"
        raise DSPFormatError(f"{path} {what}: {error}") from error
    model.load_state_dict(tensors, assign=True)
    _tie(model, header.get("tied", {}))
    _make_real(model)
    return model


def _describe(model: nn.Module, tensors: dict[str, Tensor], example_input: Example | None) -> dict[str, Any]:
    """A header of version 2 or 3, after the network was built from it and run without memory."""
    if example_input is None and len(known := getattr(model, "example_shapes", ())) > 1:
        example_input = tuple(torch.empty(shape, device="meta") for shape in known)
    parts = encode_network(model, example_input)
    if widths := getattr(model, "dense_widths", None):
        parts["dense_widths"] = widths
    table = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    shapes, given = _example_shapes(model, example_input)
    errors: list[DSPFormatError] = []
    for every in shapes:
        parts["example_shape"] = list(every[0])
        if len(every) > 1:
            parts["further_shapes"] = [list(shape) for shape in every[1:]]
        version = 2 if len(every) == 1 else 3
        header = new_header(version, example_given=given, **parts)
        header = json.loads(json.dumps(header))  # what a reader gets
        budget = Budget(2**62, 2**62)
        network = _network(header, table, budget)
        check_tensors(network, table, type(model).__name__)
        try:
            check_network(network.eval(), every, _floating(table))
        except DSPFormatError as error:
            errors.append(error)
            continue
        return header
    raise DSPFormatError(f"{errors[0]}. Pass save(..., example_input=...) with an input of the right size")


def _example_shapes(
    model: nn.Module, example_input: Example | None
) -> tuple[list[tuple[tuple[int, ...], ...]], bool]:
    """What may stand for an example: the shapes of all inputs, for each; and whether it was given."""
    if example_input is not None:
        return [tuple((1, *x.shape[1:]) for x in as_inputs(example_input))], True
    known = getattr(model, "example_shape", None)
    if known is not None and is_example_shape(known):
        return [(tuple(known),)], bool(getattr(model, "example_given", False))
    channels = input_channels(model)
    return [((1, channels, size, size),) for size in _USUAL_SIZES], False


def input_channels(model: nn.Module) -> int:
    """Input channels of the first convolution. Raises DSPFormatError where there is none."""
    for module in model.modules():
        if isinstance(module, FusedConv2d):
            return module.spec.structure.in_channels
        if isinstance(module, nn.Conv2d | PackedConv2d):
            return module.in_channels
    raise DSPFormatError(f"{type(model).__name__} has no convolution, so an example input is needed")


def _floating(table: Any) -> torch.dtype:
    """The floating dtype of a file's tensors, of which there is one; float32 where it has none."""
    return next((dtype for _, dtype in table.values() if dtype.is_floating_point), torch.float32)


def _network(header: dict[str, Any], table: Any, budget: Budget) -> LoadedNetwork:
    shape, modes = header.get("example_shape"), header.get("modes")
    if not is_example_shape(shape) or shape is None:
        raise DSPFormatError(f"the example's shape is {str(shape)[:80]}; expected four sizes of an image")
    further = header.get("further_shapes", []) if header["version"] > 2 else []
    if not isinstance(further, list) or len(further) > 15 or not all(map(is_input_shape, further)):
        raise DSPFormatError(f"shapes of further inputs are {str(further)[:80]}; expected up to 15 of sizes")
    if modes not in ("both", "eval"):
        raise DSPFormatError(f"modes is {str(modes)[:80]}; expected both or eval")
    meta = {
        "example_shapes": (tuple(shape), *map(tuple, further)),
        "example_given": header.get("example_given") is True,
        "modes": modes,
    }
    network = build_network(header, meta, table, budget)
    network.dense_widths = _dense_widths(header)
    return network


def _dense_widths(header: dict[str, Any]) -> dict[str, tuple[int, int, int]] | None:
    """Path -> (input channels, output channels, groups) before packing; None where the file has none."""
    widths = header.get("dense_widths")
    if widths is None:
        return None
    for path, sizes in widths.items() if isinstance(widths, dict) else [("", widths)]:
        fits = isinstance(sizes, list) and len(sizes) == 3 and path in header["modules"]
        if not fits or not all(type(size) is int and 1 <= size < 2**31 for size in sizes):
            raise DSPFormatError(f"dense_widths of {path[:80]!r} are {str(sizes)[:80]}; expected three sizes")
    return {path: tuple(sizes) for path, sizes in widths.items()}


def _check_ties(model: nn.Module, tied: Any) -> None:
    """Raises DSPFormatError for names that cannot be one tensor."""
    state = model.state_dict(keep_vars=True)
    pairs = tied.items() if isinstance(tied, dict) else [(tied, None)]
    for name, first in pairs:
        if not isinstance(first, str) or name not in state or first not in state or first in tied:
            raise DSPFormatError(
                f"{str(name)[:80]!r} is said to be {str(first)[:80]!r}; expected two tensors"
            )
        a, b = state[name], state[first]
        if type(a) is not type(b) or a.shape != b.shape:
            raise DSPFormatError(f"{name!r} and {first!r} cannot be the same tensor: {a.shape}, {b.shape}")


def _tie(model: nn.Module, tied: dict[str, str]) -> None:
    """Let names be the same parameter or buffer again; a file holds it once under each name."""
    state = model.state_dict(keep_vars=True)
    for name, first in tied.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, state[first])


def _make_real(model: nn.Module) -> None:
    """Give modules that were made on the meta device their index tensors, which no file holds."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PackedConv2d):
                child.reset_index("cpu")
            elif isinstance(child, FusedConv2d):
                made = FusedConv2d(child.spec, list(child.weights), child.bias, child.backend)
                setattr(parent, name, made)
