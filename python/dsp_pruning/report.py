"""What pruning has left of a network: one row per layer, totals, and a picture of every layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPError, DSPPruningError, DSPShapeError
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.graph.network import evaluating
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.whole_file import whole_file

__all__ = [
    "LayerRow",
    "NetworkCost",
    "draw_overview",
    "draw_structures",
    "layer_rows",
    "network_cost",
    "save_figure",
    "short_name",
]

# Colour-blind safe (Okabe and Ito 2008), strongest first; a 9th group starts again.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_EMPTY = "#EEEEEE"


@dataclass(frozen=True)
class LayerRow:
    """One packed convolution.

    channels_read of in_channels are read by at least one group, filters of out_channels are still there;
    widths are those of the dense layer where it is known, else those of the packed one.
    macs, dense_macs: multiply-adds of one image.
    """

    name: str
    groups: int
    channels_read: int
    in_channels: int
    filters: int
    out_channels: int
    macs: int
    dense_macs: int

    @property
    def kept(self) -> float:
        """Share of the multiply-adds that is left, 0..1."""
        return self.macs / max(self.dense_macs, 1)


@dataclass(frozen=True)
class NetworkCost:
    """Multiply-adds of one image in all convs and linear layers, and all learnable numbers of the network."""

    macs: int
    params: int


def layer_rows(model: nn.Module, example_input: Example, dense: nn.Module | None = None) -> list[LayerRow]:
    """One row for every PackedConv2d, in definition order.

    example_input: (batch, channels, height, width). dense: the unpruned network; a layer of the same name
    gives the widths that the packed one is held against.
    Raises DSPPruningError where the model holds no PackedConv2d.
    """
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedConv2d)}
    if not packed:
        raise DSPPruningError(f"{type(model).__name__} holds no PackedConv2d: pack a pruned network first")
    output_hw = _output_sizes(model, example_input)
    originals = {} if dense is None else dict(dense.named_modules())
    rows = []
    for name, module in packed.items():
        structure, original = module.structure, originals.get(name)
        in_channels, out_channels = structure.in_channels, structure.out_channels
        if isinstance(original, nn.Conv2d):
            in_channels, out_channels = original.in_channels, original.out_channels
        whole = GroupStructure.dense(in_channels, out_channels)
        rows.append(
            LayerRow(
                name=name,
                groups=len(structure.groups),
                channels_read=len(structure.read),
                in_channels=in_channels,
                filters=structure.out_channels - len(structure.absent),
                out_channels=out_channels,
                macs=structure.macs(module.kernel_size, output_hw[module]),
                dense_macs=whole.macs(module.kernel_size, output_hw[module]),
            )
        )
    return rows


def network_cost(model: nn.Module, example_input: Example) -> NetworkCost:
    """Cost of a dense or packed network. example_input: (batch, channels, height, width), or all inputs."""
    macs = 0
    for module, (height, width) in _output_sizes(model, example_input).items():
        if isinstance(module, PackedConv2d):
            macs += module.structure.macs(module.kernel_size, (height, width))
        elif isinstance(module, nn.Conv2d | nn.Linear):
            macs += module.weight.numel() * height * width
    return NetworkCost(macs, sum(parameter.numel() for parameter in _learnable(model)))


def draw_structures(model: nn.Module, path: str | Path, title: str = "") -> Path:
    """Draw the filters x channels matrix of every PackedConv2d on one page, a colour for each group.

    path: .png, .pdf or .svg. Rows are filters, columns input channels; grey kernels are pruned.
    Raises DSPPruningError where the model holds no PackedConv2d, DSPError where matplotlib is missing or
    the file cannot be written.
    """
    layers = [(name, m.structure) for name, m in model.named_modules() if isinstance(m, PackedConv2d)]
    if not layers:
        raise DSPPruningError(f"{type(model).__name__} holds no PackedConv2d: there is nothing to draw")
    try:
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DSPError("pictures need matplotlib: pip install 'dsp-kernels[cli]'") from error
    columns = math.ceil(math.sqrt(1.5 * len(layers)))
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(1.5 * columns, 1.75 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    colours = ListedColormap([_EMPTY, *_COLOURS])
    for axis, (name, structure) in zip(axes, layers, strict=False):
        # A matrix much wider than high would be a line if its kernels were squares.
        ratio = structure.in_channels / structure.out_channels
        axis.imshow(
            _group_matrix(structure).numpy(),
            cmap=colours,
            vmin=0,
            vmax=len(_COLOURS),
            interpolation="none",
            aspect="equal" if 0.4 <= ratio <= 2.5 else "auto",
        )
        axis.set_title(short_name(name), fontsize=6, pad=3)
        axis.set_xlabel(f"{structure.in_channels} channels", fontsize=5, labelpad=1)
        axis.set_ylabel(f"{structure.out_channels} filters", fontsize=5, labelpad=1)
        axis.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
    for axis in axes[len(layers) :]:
        axis.set_axis_off()
    figure.suptitle(title or f"{type(model).__name__}: groups in colour, pruned kernels grey", fontsize=10)
    return save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a matplotlib figure, complete or not at all. Raises DSPError where it cannot be written."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(target) as temporary:
            figure.savefig(temporary, dpi=200)
    except (ValueError, OSError) as error:  # ValueError: an ending that matplotlib does not know
        raise DSPError(f"cannot write the picture {target}: {error}") from error
    return target


def _group_matrix(structure: GroupStructure) -> Tensor:
    """uint8 (out_channels, in_channels): 0 where no kernel lives, else 1 + the group's colour."""
    matrix = torch.zeros(structure.out_channels, structure.in_channels, dtype=torch.uint8)
    for number, group in enumerate(structure.groups):
        rows, columns = torch.tensor(group.out_index), torch.tensor(group.in_index, dtype=torch.long)
        matrix[rows[:, None], columns] = 1 + number % len(_COLOURS)
    return matrix


def short_name(name: str, most: int = 22) -> str:
    """The end of a long dotted name, which tells layers apart."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _learnable(model: nn.Module) -> Iterator[nn.Parameter]:
    """All parameters but the group logits, which are no part of the network that runs."""
    for name, parameter in model.named_parameters():
        if not name.endswith(".group"):
            yield parameter


def _output_sizes(model: nn.Module, example_input: Example) -> dict[nn.Module, tuple[int, int]]:
    """Height and width of what each conv and linear layer gives; 1 x 1 for a linear one."""
    sizes: dict[nn.Module, tuple[int, int]] = {}
    inputs = as_inputs(example_input)

    def note(module: nn.Module, inputs: Any, output: Tensor) -> None:
        sizes[module] = (output.shape[2], output.shape[3]) if output.ndim == 4 else (1, 1)

    with _hooked(model, note), evaluating(model), torch.no_grad():
        try:
            model(*inputs)
        except (RuntimeError, DSPShapeError) as error:
            raise DSPShapeError(
                f"{type(model).__name__} does not run on an input of shape "
                f"{' and '.join(str(tuple(x.shape)) for x in inputs)}: {error}"
            ) from error
    return sizes


@contextmanager
def _hooked(model: nn.Module, hook: Any) -> Iterator[None]:
    kinds = (PackedConv2d, nn.Conv2d, nn.Linear)
    handles = [m.register_forward_hook(hook) for m in model.modules() if isinstance(m, kinds)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_KEPT, _DENSE = "#0072B2", "#DDDDDD"
_ROW = 0.16  # inches: text of 6 points with some air, so that 100 layers are a page of 16 inches


def draw_overview(rows: Sequence[LayerRow], path: str | Path, title: str = "") -> Path:
    """Draw a bar per layer: multiply-adds before (grey) and after pruning, and the share that was kept.

    rows: of ``layer_rows``. path: .png, .pdf or .svg.
    Raises DSPPruningError for no rows, DSPError where matplotlib is missing or the file cannot be written.
    """
    if not rows:
        raise DSPPruningError("no packed layer: there is nothing to draw")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DSPError("pictures need matplotlib: pip install 'dsp-kernels[cli]'") from error
    figure = Figure(figsize=(8, _ROW * len(rows) + 1.2), layout="constrained")
    amounts, shares = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    places = range(len(rows))
    amounts.barh(places, [row.dense_macs / 1e6 for row in rows], color=_DENSE, label="dense")
    amounts.barh(places, [row.macs / 1e6 for row in rows], color=_KEPT, label="kept")
    shares.barh(places, [100 * row.kept for row in rows], color=_KEPT)
    amounts.set_yticks(places, [short_name(row.name, 40) for row in rows], fontsize=6)
    amounts.set_ylim(len(rows) - 0.4, -0.6)
    amounts.set_xlabel("million multiply-adds per image", fontsize=7)
    shares.set_xlim(0, 100)
    shares.set_xlabel("% kept", fontsize=7)
    total, dense = sum(row.macs for row in rows), sum(row.dense_macs for row in rows)
    mean = 100 * total / max(dense, 1)
    shares.axvline(mean, color="black", linewidth=0.8)
    shares.set_title(f"all together {mean:.1f} %", fontsize=7)
    amounts.legend(fontsize=6, loc="best")
    for axis in (amounts, shares):
        axis.tick_params(labelsize=6)
    if title:
        figure.suptitle(title, fontsize=9)
    return save_figure(figure, path)
