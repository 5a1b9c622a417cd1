"""save and load: tensors in safetensors, the network in its JSON header; no pickle, no code."""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.check import check_network, check_tensors, floating_dtype, is_shape, tensor_table
from dsp_kernels.file.decode import Budget, LoadedNetwork, build_network
from dsp_kernels.file.encode import encode_network
from dsp_kernels.file.format import FORMAT, KEY, read_header
from dsp_kernels.file.quantization import RECORD, check_record, decode_record, encode_record
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.program.fuse import FusedNetwork, example_of
from dsp_kernels.quantizing.network import QuantizedNetwork
from dsp_kernels.whole_file import require_file, whole_file

# A structure may have absent channels, which take no byte; so many are allowed in a file of any size.
_FREE_WIDTHS = 2**20
# Tried in this order without an example: small images, MNIST, ImageNet, Inception.
_USUAL_SIZES = (32, 28, 224, 299, 16, 8)


def save(model: nn.Module, path: str | Path, example_input: Example | None = None) -> None:
    """Write a packed or quantised model and its architecture to a safetensors file, completely or not at all.

    example_input: (batch, channels, height, width) of the size that the network is made for; its shape is in
    the file. Without it, the first usual size that fits is. A model of several inputs needs a tuple of
    tensors of one floating dtype, the image first.

    The file holds a graph of known operations and modules. Where forward() needs sizes as numbers, an
    example is needed and the file holds eval mode for images of its size.
    Raises DSPFormatError, naming it, for something that a file cannot hold, and OSError where the file cannot
    be written.

    >>> import tempfile, torch, dsp_kernels
    >>> structure = dsp_kernels.GroupStructure.build(3, 4, [([0, 2], [0, 3]), ([1], [1])])
    >>> net = torch.nn.Sequential(dsp_kernels.PackedConv2d(structure, 3), torch.nn.ReLU()).eval()
    >>> file = tempfile.mkdtemp() + "/net.safetensors"
    >>> dsp_kernels.save(net, file, torch.zeros(1, 3, 8, 8))
    >>> dsp_kernels.load(file).example_shape
    (1, 3, 8, 8)
    """
    quantized = model if isinstance(model, QuantizedNetwork) else None
    if quantized is not None:
        model = quantized.packed
        example_input = example_of(quantized) if example_input is None else example_input
    elif isinstance(model, FusedNetwork):
        raise DSPFormatError("a fused network holds no parameters: save the packed one that it was made from")
    tensors = {name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    header, numbers = _describe(model, tensors, example_input, quantized is not None)
    if quantized is not None:
        header[RECORD] = encode_record(quantized, numbers)
    try:
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={KEY: json.dumps(header)})
    except SafetensorError as error:  # of a full disk, for example
        raise OSError(f"cannot write {path}: {error}") from error


def load(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """The packed or quantised model in a file that ``save`` wrote, in eval mode. Runs no code from the file.

    The network is made of operations and modules of fixed tables, first on the meta device: shapes and dtypes
    of all tensors are compared with its modules and its calls are run there before a tensor is read.
    Raises DSPFormatError for a file that is truncated, foreign, of another version or inconsistent, and
    FileNotFoundError.

    >>> import tempfile, torch, dsp_kernels
    >>> file = tempfile.mkdtemp() + "/conv.safetensors"
    >>> dsp_kernels.save(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1)), file)
    >>> dsp_kernels.load(file)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 4, 8, 8])
    """
    require_file(path)
    # Parameters made in the caller's inference mode could not be trained.
    with torch.inference_mode(False):
        return _load(path).to(device).eval()


def _load(path: str | Path) -> LoadedNetwork | QuantizedNetwork:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = read_header(file.metadata(), path)
            table = tensor_table(file, path)
            check_record(header)
            model = build_network(header, table, Budget(Path(path).stat().st_size + _FREE_WIDTHS, len(table)))
            tied = header.get("tied", {})
            check_tensors(model, table, tied, path)
            check_network(model.eval(), model.example_shapes, floating_dtype(table), RECORD in header)
            # safetensors maps the file into memory, and another process may change it: copy.
            tensors = {name: file.get_tensor(name).clone() for name in table}
    except (SafetensorError, OSError, RecursionError) as error:
        what = f"is not a readable safetensors file{_other_kind(path)}"
        raise DSPFormatError(f"{path} {what}: {error}") from error
    model.load_state_dict(tensors, assign=True)
    state = model.state_dict(keep_vars=True)
    for name, first in tied.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, state[first])
    for module in model.modules():
        if isinstance(module, PackedConv2d | FusedConv2d):
            module.reset_index("cpu")  # no file holds index tensors
    return model if RECORD not in header else decode_record(model, header[RECORD])


def _other_kind(path: str | Path) -> str:
    """What else a file that is no safetensors file looks like, in brackets."""
    if zipfile.is_zipfile(path):
        return " (it is a zip archive, as of torch.save or numpy; dsp_kernels.save writes what load reads)"
    return " (ONNX is only written)" if Path(path).suffix == ".onnx" else ""


def _describe(
    model: nn.Module, tensors: dict[str, Tensor], example_input: Example | None, is_quantized: bool
) -> tuple[dict[str, Any], dict[str, int]]:
    """A header with which ``load`` will succeed: its checks were run. The number of every call by its name.

    tensors: of the state dict; those that forward() makes are added.
    """
    if example_input is None and len(known := getattr(model, "example_shapes", ())) > 1:
        example_input = tuple(torch.empty(shape, device="meta") for shape in known)
    parts, constants, numbers = encode_network(model, example_input)
    tensors |= {name: tensor.detach().cpu().contiguous().clone() for name, tensor in constants.items()}
    for path, widths in (getattr(model, "dense_widths", None) or {}).items():
        # Readers of version 3 and before know no tensors here. swap() folds some tensors away.
        for kind, key in (("tensors", "dense_tensors"), ("modules", "dense_widths")):
            if path in parts[kind]:
                parts.setdefault(key, {})[path] = widths
    table = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    candidates, given = _input_shapes(model, example_input)
    errors: list[DSPFormatError] = []
    for shapes in candidates:
        parts["example_shape"] = shapes[0]
        if len(shapes) > 1:
            parts["further_shapes"] = shapes[1:]
        own = any("." in call.get("tensor", "") for call in parts["calls"])  # tensors of modules
        version = 4 if own else 3 if len(shapes) > 1 else 2
        # readable_from: a later version that only adds keys keeps it, so older readers still read its files.
        header = {"format": FORMAT, "version": version, "readable_from": version, "example_given": given}
        header = json.loads(json.dumps(header | parts))  # tuples become lists
        network = build_network(header, table, Budget())
        check_tensors(network, table, header["tied"], type(model).__name__)
        try:
            check_network(network.eval(), shapes, floating_dtype(table), is_quantized)
        except DSPFormatError as error:
            errors.append(error)
            continue
        return header, numbers
    raise DSPFormatError(f"{errors[0]}. Pass save(..., example_input=...) with an input of the right size")


def _input_shapes(
    model: nn.Module, example_input: Example | None
) -> tuple[list[tuple[tuple[int, ...], ...]], bool]:
    """Shapes of all inputs to try in turn, and whether the user gave them."""
    if example_input is not None:
        return [tuple((1, *x.shape[1:]) for x in as_inputs(example_input))], True
    known = getattr(model, "example_shape", None)
    if is_shape(known, (4,)):
        return [(tuple(known),)], bool(getattr(model, "example_given", False))
    channels = input_channels(model)
    return [((1, channels, size, size),) for size in _USUAL_SIZES], False


def input_channels(model: nn.Module) -> int:
    """Input channels of the first convolution. Raises DSPFormatError where there is none."""
    for module in model.modules():
        if isinstance(module, PackedConv2d | FusedConv2d):
            return module.spec.structure.in_channels
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise DSPFormatError(f"{type(model).__name__} has no convolution, so an example input is needed")
