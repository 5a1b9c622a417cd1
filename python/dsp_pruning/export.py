"""Packed networks as ONNX, PyTorch exported programs and TorchScript, for other programs to run."""

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels import FusedConv2d, FusedNetwork, swap
from dsp_kernels.errors import DSPError, DSPShapeError
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.graph.network import trace
from dsp_kernels.op.activations import activate
from dsp_kernels.op.dense import live_bias
from dsp_kernels.op.structure import Group
from dsp_kernels.whole_file import fill, whole_file

__all__ = ["export_onnx", "export_pt2", "export_torchscript"]

_LEAST_OPSET = 18


def export_onnx(
    model: nn.Module,
    path: str | Path,
    example_input: Example,
    *,
    opset: int = _LEAST_OPSET,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a packed network as ONNX, in eval mode, with batch norms folded, for any batch size.

    Height and width of the images are free too if the network takes other sizes.

    example_input: (batch, channels, height, width) of the size that the network is made for; a tuple for
        several inputs, which the file calls input, input_1 and so on.
    opset: at least 18. dtype: float32 or float16, of weights, inputs and output.

    Each packed convolution becomes at most one Gather of the channels that its groups read, one Conv per
    group and a Concat; the file needs nothing of this package. The model is not changed. Raises DSPError if
    onnx and onnxscript are missing or torch cannot export the network, and DSPShapeError if the network does
    not run on the example.

    >>> import tempfile
    >>> from dsp_kernels import GroupStructure, PackedConv2d
    >>> net = torch.nn.Sequential(PackedConv2d(GroupStructure.uniform(4, 8, 2), 3)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(net, f"{folder}/net.onnx", torch.zeros(1, 4, 8, 8)).name
    'net.onnx'
    """
    if opset < _LEAST_OPSET or dtype not in (torch.float32, torch.float16):
        raise DSPError(
            f"opset is {opset}, dtype {dtype}; expected at least {_LEAST_OPSET}, float32 or float16"
        )
    try:
        import onnxscript  # noqa: F401  # torch needs it to write ONNX
    except ImportError as error:
        raise DSPError("ONNX export needs onnx and onnxscript: pip install onnx onnxscript") from error
    inputs = tuple(x.cpu().to(dtype) for x in _two_images(model, example_input))
    plain = _plain_form(model).cpu().to(dtype)

    names = ["input", *(f"input_{number}" for number in range(1, len(inputs)))]
    settings: dict[str, Any] = {"input_names": names, "output_names": ["output"], "opset_version": opset}
    export: Any = partial(torch.onnx.export, plain, inputs, dynamo=True, verbose=False, **settings)
    first, *rest = _any_batch(inputs)
    program, fixed = None, ""
    with _exporting(model, path, plain, inputs) as temporary:
        if others := _other_sizes(plain, inputs):
            free = first | {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
            try:
                made = export(dynamic_shapes=(free, *rest))
                torch.testing.assert_close(made.exported_program.module()(*others[0]), others[1])
                program = made
            except Exception as error:  # what its code does depends on the size
                fixed = str(error).partition("\n")[0]
        program = program or export(dynamic_shapes=(first, *rest))
        program.save(str(temporary), external_data=False)
    if fixed:
        warnings.warn(f"{path} takes images of the example's size only: {fixed}", stacklevel=2)
    return Path(path)


def export_pt2(model: nn.Module, path: str | Path, example_input: Example) -> Path:
    """Write a packed or swapped network with ``torch.export``, in eval mode, for any batch size.

    A packed network becomes plain PyTorch operations. A swapped one keeps each fused convolution as one
    ``dsp_kernels::gather_grouped_conv2d`` node, so import dsp_kernels before ``torch.export.load``.
    Raises DSPError if torch cannot export the network.

    >>> import tempfile
    >>> from dsp_kernels import GroupStructure, PackedConv2d
    >>> net = torch.nn.Sequential(PackedConv2d(GroupStructure.uniform(4, 8, 2), 3)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = export_pt2(net, f"{folder}/net.pt2", torch.zeros(1, 4, 8, 8))
    ...     torch.export.load(path).module()(torch.zeros(5, 4, 8, 8)).shape
    torch.Size([5, 8, 6, 6])
    """
    inputs, copied = _two_images(model, example_input), copy.deepcopy(model).eval()
    with _exporting(model, path, copied, inputs) as temporary:
        program = torch.export.export(copied, inputs, dynamic_shapes=_any_batch(inputs))
        fill(temporary, partial(torch.export.save, program))
    return Path(path)


def export_torchscript(model: nn.Module, path: str | Path, example_input: Example) -> Path:
    """Write a packed network as TorchScript of ordinary operations, for ``torch.jit.load`` anywhere.

    In eval mode, with batch norms folded, for every batch and image size that the network takes. Raises
    DSPError if torch cannot trace the network, or if what its code does depends on these sizes.

    >>> import tempfile
    >>> from dsp_kernels import GroupStructure, PackedConv2d
    >>> net = torch.nn.Sequential(PackedConv2d(GroupStructure.uniform(4, 8, 2), 3)).eval()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = export_torchscript(net, f"{folder}/net.pt", torch.zeros(1, 4, 8, 8))
    ...     torch.jit.load(path)(torch.zeros(5, 4, 16, 16)).shape
    torch.Size([5, 8, 14, 14])
    """
    inputs, plain = _two_images(model, example_input), _plain_form(model)
    with _exporting(model, path, plain, inputs) as temporary:
        # A TorchScript trace fixes the branches of the code and numbers computed from sizes.
        if trace(plain, inputs).captured.check is not None:
            raise DSPError("what forward() does depends on the size of the images")
        with warnings.catch_warnings():
            warnings.simplefilter("error", torch.jit.TracerWarning)
            traced = torch.jit.trace(plain, tuple(x.clone() for x in inputs), check_trace=False)
        if others := _other_sizes(plain, inputs):
            try:
                torch.testing.assert_close(traced(*others[0]), others[1])
            except Exception as error:
                raise DSPError(f"it would be wrong for images of another size: {error}") from error
        fill(temporary, partial(torch.jit.save, traced))
    return Path(path)


def _plain_form(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose packed convolutions are gathers and ordinary convolutions, norms folded."""
    plain = swap(copy.deepcopy(model).eval(), backend="eager")
    if isinstance(plain, FusedConv2d):
        return _PlainConv(plain).eval()
    for parent in list(plain.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, FusedConv2d):
                setattr(parent, name, _PlainConv(child))
    return plain.eval()


class _PlainConv(nn.Module):
    """A FusedConv2d of plain operations: gather once, convolve each group, concatenate, reorder."""

    gather: Tensor | None
    order: Tensor | None
    constant: Tensor | None

    def __init__(self, fused: FusedConv2d) -> None:
        super().__init__()
        spec, structure = fused.spec, fused.spec.structure
        some = next(fused.parameters(), torch.empty(0))
        every = range(structure.out_channels)
        groups = [(g, w) for g, w in zip(structure.groups, fused.weights, strict=True) if g.in_index]
        if not groups:  # every output is its bias; a convolution with zeros gives it its size
            groups = [(Group((0,), tuple(every)), some.new_zeros(len(every), 1, *spec.kernel_size))]
        read = [channel for group, _ in groups for channel in group.in_index]
        written = [channel for group, _ in groups for channel in group.out_index]
        others = sorted(set(every) - set(written))
        order = torch.tensor([*written, *others], device=some.device).argsort()
        self.activation = spec.activation
        self.settings = (spec.stride, spec.padding, spec.dilation)
        self.weights = nn.ParameterList(weight.detach() for _, weight in groups)
        self.sizes = [len(group.in_index) for group, _ in groups]
        self.missing = len(others)
        gathers = read != list(range(structure.in_channels))
        self.register_buffer("gather", torch.tensor(read, device=some.device) if gathers else None)
        self.register_buffer("order", order if order.tolist() != list(every) else None)
        bias = live_bias(structure, fused.bias)
        biases = [] if bias is None else [bias.detach()[list(group.out_index)] for group, _ in groups]
        self.biases = nn.ParameterList(biases)
        constant = None if bias is None else bias.detach()[:, None, None].clone()
        if constant is not None:  # of groups that read nothing
            constant[written] = 0
        self.register_buffer("constant", constant if constant is not None and constant.any() else None)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in_channels, height, width) -> (batch, out_channels, out_height, out_width)."""
        if self.gather is not None:
            x = _reordered(x, self.gather)
        parts = x.split(self.sizes, 1) if len(self.sizes) > 1 else (x,)
        biases = list(self.biases) or [None] * len(self.sizes)
        outputs = [
            F.conv2d(part, weight, bias, *self.settings)
            for part, weight, bias in zip(parts, self.weights, biases, strict=True)
        ]
        y = torch.cat(outputs, 1) if len(outputs) > 1 else outputs[0]
        if self.missing:
            y = F.pad(y, (0, 0, 0, 0, 0, self.missing))
        if self.order is not None:
            y = _reordered(y, self.order)
        if self.constant is not None:
            y = y + self.constant
        return activate(y, self.activation)


def _reordered(x: Tensor, order: Tensor) -> Tensor:
    """x[:, order]."""
    # OpenVINO 2026.4 folds a Gather of axis 1 into a later Conv, with the inverse order.
    return x.unsqueeze(1).index_select(2, order).squeeze(1)


def _two_images(model: nn.Module, example_input: Example) -> tuple[Tensor, ...]:
    """Batches of two: torch takes a batch of one for a constant. Raises DSPError for a fused network."""
    if isinstance(model, FusedNetwork):
        raise DSPError("a fused network is for this machine: export the packed one that it was made from")
    inputs = as_inputs(example_input)
    if inputs[0].dim() != 4:
        raise DSPShapeError(
            f"the example has shape {tuple(inputs[0].shape)}; expected (batch, channels, height, width)"
        )
    return tuple(x[:1].repeat(2, *[1] * (x.dim() - 1)) for x in inputs)


def _any_batch(inputs: tuple[Tensor, ...]) -> Any:
    batch = torch.export.Dim("batch")
    return tuple({0: batch} for _ in inputs)


def _other_sizes(plain: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Any] | None:
    """Three larger images and what ``plain`` answers; None if it does not take them."""
    height, width = inputs[0].shape[2:]
    image = torch.randn(3, inputs[0].shape[1], height * 3 // 2 + 1, width * 3 // 2 + 1).to(inputs[0])
    others = (image, *(x[:1].repeat(3, *[1] * (x.dim() - 1)) for x in inputs[1:]))
    try:
        return others, plain(*(x.clone() for x in others))
    except Exception:  # made for images of one size
        return None


@contextmanager
def _exporting(
    model: nn.Module, path: str | Path, exported: nn.Module, inputs: tuple[Tensor, ...]
) -> Iterator[Path]:
    """A temporary file that becomes ``path``, or a DSPError."""
    logger = logging.getLogger("torch.onnx")  # torch reports its progress there, and in warnings
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with whole_file(path) as temporary, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield temporary
    except OSError:
        raise
    except Exception as error:  # torch.export and torch.onnx raise errors of many kinds
        try:  # what the network itself says about a wrong example is clearer than what exporters make of it
            with torch.no_grad():
                exported(*(x.clone() for x in inputs))
        except Exception as wrong:
            shapes = " and ".join(str((1, *x.shape[1:])) for x in inputs)
            raise DSPShapeError(
                f"{type(model).__name__} does not run on an example of shape {shapes}: {wrong}"
            ) from wrong
        raise DSPError(f"{type(model).__name__} cannot be exported to {path}: {str(error)[:400]}") from error
    finally:
        logger.setLevel(level)
