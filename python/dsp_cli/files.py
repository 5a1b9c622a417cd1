"""``dsp pack``, ``import``, ``download``, ``inspect`` and ``export``: files of networks."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.table import Table
from torch import Tensor, nn

import dsp_kernels
from dsp_cli import options as o
from dsp_cli.show import console, progress_bars
from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.save_load import input_channels
from dsp_kernels.program.steps import ConvStep, LinearStep
from dsp_pruning.export import export_onnx, export_pt2, export_torchscript
from dsp_pruning.named import make_model
from dsp_pruning.packing import pack as packing
from dsp_pruning.packing.twin import dense_twin
from dsp_pruning.recipes.finetune import load_pruned
from dsp_pruning.recipes.run import trained_image_size
from dsp_pruning.released.archive import is_torchscript
from dsp_pruning.released.download import ARCHIVES, download_released
from dsp_pruning.released.load import load_released, verify_released
from dsp_pruning.report import draw_overview, draw_structures, layer_rows, network_cost

Format = StrEnum("Format", "onnx pt2 torchscript")
Precision = StrEnum("Precision", "fp32 fp16")

_USUAL_SIZE = 32  # pixels, where neither a file nor the user says how large an image is
_IMAGENET_SIZE = 224


def pack(
    ckpt: Annotated[Path, typer.Option("--ckpt", help="Weights written by dsp finetune.")],
    save: Annotated[Path, typer.Option("--save", help="File to write (.safetensors).")],
    image_size: o.ImageSize = None,
    fixed_size: Annotated[
        bool, typer.Option("--fixed-size", help="Fold more, for images of exactly this size.")
    ] = False,
    model: o.Model = "",
    model_args: o.ModelArgs = None,
) -> None:
    """Pack a pruned network exactly; the result is compared with it before it is saved."""
    check_packed_name(save)
    masked, example = pruned_network(ckpt, image_size, model, model_args)
    packed = packing.pack(masked, example, fixed_size)
    dsp_kernels.save(packed, save, example)
    size = example.shape[2:]
    before, after = network_cost(masked, example), network_cost(packed, example)
    console.print(
        f"{save}: {100 * (1 - after.macs / before.macs):.2f} % of the multiply-adds and "
        f"{100 * (1 - after.params / before.params):.2f} % of the parameters of the whole network removed; "
        f"for images of {size[0]}x{size[1]}",
        soft_wrap=True,
    )


def import_network(
    file: Annotated[Path, typer.Argument(help="A TorchScript archive, a checkpoint or .npz arrays.")],
    out: Annotated[Path, typer.Argument(help="File to write (.safetensors).")],
    image_size: o.ImageSize = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Also run the archive, which executes its code, and compare the outputs."
        ),
    ] = False,
) -> None:
    """Turn a published network into a packed one. The code of an archive is parsed, not run."""
    check_packed_name(out)
    network = load_released(file)
    (example, *_), _ = example_of(network, image_size)
    if verify:
        if not is_torchscript(file):
            raise DSPFormatError(
                f"--verify runs a TorchScript archive; {file} holds weights only, and packing a checkpoint "
                "compares by itself"
            )
        difference = verify_released(file, network, (example.shape[2], example.shape[3]))
        console.print(f"the archive and the imported network differ by at most {difference:.2g}")
    _save_released(network, out, example)


def download(
    names: Annotated[list[str], typer.Argument(help="Names of released networks, or all.")],
    folder: Annotated[Path, typer.Option("--folder", help="Where NAME.safetensors is written.")] = Path(),
) -> None:
    """Fetch networks that the authors of the paper published, and turn them into packed ones.

    The archives are verified by their digests and kept in the cache folder.
    """
    for name in ARCHIVES if names == ["all"] else names:
        with progress_bars() as stage:
            archive = download_released(name, progress=stage(name))
        network = load_released(archive)
        size = _USUAL_SIZE if name.startswith(("resnet20", "resnet56")) else _IMAGENET_SIZE
        _save_released(network, folder / f"{name}.safetensors", example_of(network, size)[0][0])


def _save_released(network: nn.Module, out: Path, example: Tensor) -> None:
    dsp_kernels.save(network, out, torch.zeros_like(example))
    convs = [module for module in network.modules() if isinstance(module, PackedConv2d)]
    branches = sum(len(conv.structure.groups) for conv in convs)
    console.print(f"{out}: {len(convs)} packed layers of {branches} branches", soft_wrap=True)


def inspect(
    file: o.File,
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw every layer's groups here.")] = None,
    overview: Annotated[
        Path | None, typer.Option("--overview", help="Draw the multiply-adds kept in every layer here.")
    ] = None,
    image_size: o.ImageSize = None,
    model: o.Model = "",
    model_args: o.ModelArgs = None,
) -> None:
    """Show groups, channels, filters and multiply-adds of every packed layer.

    With --model, FILE holds the weights that dsp finetune wrote.
    """
    network, example, known = packed_network(file, image_size, model, model_args)
    if isinstance(network, dsp_kernels.QuantizedNetwork):
        console.print(quantized_layers(network), soft_wrap=True)
        network = network.packed
    dense = dense_twin(network) if getattr(network, "dense_widths", None) else None
    rows = layer_rows(network, example, dense)
    size = f"{example[0].shape[2]} x {example[0].shape[3]}"
    table = Table("layer", title=f"{file}, images of {size}", title_justify="left")
    table.columns[0].overflow = "fold"  # long names are told apart by their ends
    for column in ("groups", "channels read", "filters", "MACs", "MACs kept"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.name,
            str(row.groups),
            f"{row.channels_read} of {row.in_channels}",
            f"{row.filters} of {row.out_channels}",
            f"{row.macs:,}",
            f"{100 * row.kept:.1f} %",
        )
    console.print(table)
    if not known:
        console.print(f"the file does not say how large its images are; {size} is one size that fits")
    kept = sum(row.macs for row in rows) / max(sum(row.dense_macs for row in rows), 1)
    console.print(f"packed layers: {100 * kept:.2f} % of the multiply-adds kept")
    cost = network_cost(network, example)
    if dense is not None:
        whole = network_cost(dense, example)
        console.print(
            f"whole network: {cost.macs:,} multiply-adds ({100 * cost.macs / whole.macs:.2f} % kept), "
            f"{cost.params:,} parameters ({100 * cost.params / whole.params:.2f} % kept)"
        )
    else:
        console.print(
            f"whole network: {cost.macs:,} multiply-adds, {cost.params:,} parameters; the file does not hold "
            "the widths before packing, so the share kept is relative to the widths of the packed layers"
        )
    if picture is not None:
        console.print(f"picture: {draw_structures(network, picture, title=str(file))}", soft_wrap=True)
    if overview is not None:
        console.print(f"overview: {draw_overview(rows, overview, title=str(file))}", soft_wrap=True)


def export(
    file: o.File,
    out: Annotated[Path, typer.Argument(help="File to write.")],
    format_: Annotated[Format, typer.Option("--format", help="onnx, pt2 or torchscript.")] = Format.onnx,
    precision: Annotated[
        Precision, typer.Option("--precision", help="Of the tensors in an ONNX file.")
    ] = Precision.fp32,
    opset: Annotated[int, typer.Option("--opset", min=18, help="Of an ONNX file.")] = 18,
    image_size: o.ImageSize = None,
    model: o.Model = "",
    model_args: o.ModelArgs = None,
) -> None:
    """Write a packed network as ONNX of ordinary convolutions, an exported PyTorch program or TorchScript.

    With --model, FILE holds the weights that dsp finetune wrote.
    """
    network, example, _ = packed_network(file, image_size, model, model_args)
    if isinstance(network, dsp_kernels.QuantizedNetwork):
        raise DSPFormatError(f"{file} is quantised; export the packed network that it was made from")
    if format_ is Format.onnx:
        dtype = torch.float16 if precision is Precision.fp16 else torch.float32
        export_onnx(network, out, example, opset=opset, dtype=dtype)
    elif format_ is Format.pt2:
        export_pt2(network, out, example)
    else:
        export_torchscript(network, out, example)
    size = " and ".join("x".join(map(str, x.shape[1:])) for x in example)
    console.print(
        f"{out}: {out.stat().st_size:,} bytes, for images of {size}, any batch size", soft_wrap=True
    )


def quantized_layers(network: dsp_kernels.QuantizedNetwork) -> str:
    """How many layers compute in integers, bytes of weights, and which layers are float."""
    layers = [step for step in network.program.steps if isinstance(step, ConvStep | LinearStep)]
    sizes = [sum(w.numel() for w in (s.weights if isinstance(s, ConvStep) else (s.weight,))) for s in layers]
    floats = [step for step in layers if step.requantize is None]
    size = sum(n * (4 if step in floats else 1) for n, step in zip(sizes, layers, strict=True))
    left = "".join(f"; float: {s.path or s.output} ({network.program.notes[s.output]})" for s in floats)
    return (
        f"{len(layers) - len(floats)} of {len(layers)} layers in 8-bit integers, weights of {size:,} bytes "
        f"instead of {4 * sum(sizes):,}{left}"
    )


def pruned_network(
    ckpt: Path, image_size: int | None, model: str, model_args: Sequence[str] | None
) -> tuple[nn.Module, Tensor]:
    """The masked network of ``dsp finetune`` and an image of zeros of the size that it was trained on."""
    size = (image_size, image_size) if image_size else trained_image_size(ckpt) or (_USUAL_SIZE,) * 2
    own = make_model(model, o.arguments(model_args)) if model else None
    network = load_pruned(ckpt, size, own)
    return network, torch.zeros(1, input_channels(network), *size)


def packed_network(
    file: Path, image_size: int | None, model: str, model_args: Sequence[str] | None
) -> tuple[nn.Module, tuple[Tensor, ...], bool]:
    """A packed or quantised network, its inputs as of ``example_of``, and whether their size is known.

    With a model the file holds the weights that ``dsp finetune`` wrote, and they are packed.
    """
    if model:
        masked, image = pruned_network(file, image_size, model, model_args)
        return packing.pack(masked, image), (image,), True
    network = dsp_kernels.load(file)
    floating = network.packed if isinstance(network, dsp_kernels.QuantizedNetwork) else network
    return network, *example_of(floating, image_size)


def check_packed_name(path: Path) -> None:
    """Raise DSPFormatError for a path with the suffix of another format."""
    if path.suffix in (".pt", ".pth", ".pt2", ".onnx", ".npz"):
        raise DSPFormatError(
            f"{path} would contain safetensors: use .safetensors, or dsp export for another format"
        )


def example_of(model: nn.Module, image_size: int | None = None) -> tuple[tuple[Tensor, ...], bool]:
    """One image of zeros, of the user's, the file's or a usual size, and further inputs; is it known?"""
    shapes = getattr(model, "example_shapes", ())
    further = tuple(torch.zeros(shape) for shape in shapes[1:])
    channels = shapes[0][1] if shapes else input_channels(model)
    if image_size is not None:
        return (torch.zeros(1, channels, image_size, image_size), *further), True
    if shapes:
        return (torch.zeros(1, *shapes[0][1:]), *further), bool(getattr(model, "example_given", False))
    return (torch.zeros(1, channels, _USUAL_SIZE, _USUAL_SIZE),), False
