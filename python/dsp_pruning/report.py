"""What pruning has left of a network: one row per layer, totals, and pictures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPError, DSPPruningError
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.op.dense import dense_weight
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.whole_file import whole_file
from dsp_pruning.layers import run_shapes

# Colour-blind safe (Okabe and Ito 2008), strongest first; reused from the 9th group on.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
_PRUNED, _DENSE = "#EEEEEE", "#DDDDDD"
_ROW = 0.16  # inches per layer: text of 6 points with space around it, 100 layers on 16 inches


@dataclass(frozen=True)
class LayerRow:
    """One packed convolution.

    channels_read of in_channels are read by at least one group, filters of out_channels are left; widths are
    those of the dense layer if it is known, else those of the packed one.
    macs, dense_macs: multiply-adds per image.
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
    """Multiply-adds per image in all convolutions and linear layers, and parameters of the network."""

    macs: int
    params: int


def layer_rows(model: nn.Module, example_input: Example, dense: nn.Module | None = None) -> list[LayerRow]:
    """One row for every PackedConv2d, in definition order.

    example_input: (batch, channels, height, width). dense: the unpruned network, whose layers of the same
        names give the dense widths.
    Raises DSPPruningError if the model holds no PackedConv2d.
    """
    packed = _packed_layers(model, "pack a pruned network first")
    output_hw = _output_sizes(model, example_input)
    originals = {} if dense is None else dict(dense.named_modules())
    rows = []
    for name, module in packed.items():
        structure, original = module.structure, originals.get(name)
        wide = original if isinstance(original, nn.Conv2d) else structure
        whole = GroupStructure.dense(wide.in_channels, wide.out_channels)
        macs, dense_macs = (s.macs(module.kernel_size, output_hw[module]) for s in (structure, whole))
        channels = len(structure.read), wide.in_channels
        filters = structure.out_channels - len(structure.absent), wide.out_channels
        rows.append(LayerRow(name, len(structure.groups), *channels, *filters, macs, dense_macs))
    return rows


def network_cost(model: nn.Module, example_input: Example) -> NetworkCost:
    """Cost of a dense or packed network. example_input: (batch, channels, height, width), or all inputs.

    Group logits are not counted: they are no part of the network that runs.
    """
    macs = 0
    for module, (height, width) in _output_sizes(model, example_input).items():
        if isinstance(module, PackedConv2d):
            macs += module.structure.macs(module.kernel_size, (height, width))
        elif isinstance(module, nn.Conv2d | nn.Linear):
            macs += module.weight.numel() * height * width
    params = sum(p.numel() for name, p in model.named_parameters() if not name.endswith(".group"))
    return NetworkCost(macs, params)


def draw_structures(model: nn.Module, path: str | Path, title: str = "") -> Path:
    """Draw the filters x channels matrix of every PackedConv2d on one page, one colour per group.

    path: .png, .pdf or .svg. Rows are filters, columns input channels; grey kernels are pruned.
    Raises DSPPruningError if the model holds no PackedConv2d, DSPError if matplotlib is missing or the file
    cannot be written.
    """
    layers = _packed_layers(model, "there is nothing to draw")
    columns = math.ceil(math.sqrt(1.5 * len(layers)))
    rows = math.ceil(len(layers) / columns)
    figure = _figure(1.5 * columns, 1.75 * rows + 0.6)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    from matplotlib.colors import ListedColormap

    colours = ListedColormap([_PRUNED, *_COLOURS])
    for axis, (name, module) in zip(axes, layers.items(), strict=False):
        structure = module.structure
        ratio = structure.in_channels / structure.out_channels
        aspect = "equal" if 0.4 <= ratio <= 2.5 else "auto"  # square kernels would make it a line
        style = {"cmap": colours, "vmin": 0, "vmax": len(_COLOURS), "interpolation": "none"}
        axis.imshow(_group_matrix(structure).numpy(), aspect=aspect, **style)
        axis.set_title(_short(name, 22), fontsize=6, pad=3)
        axis.set_xlabel(f"{structure.in_channels} channels", fontsize=5, labelpad=1)
        axis.set_ylabel(f"{structure.out_channels} filters", fontsize=5, labelpad=1)
        axis.tick_params(bottom=False, left=False, labelbottom=False, labelleft=False)
    for axis in axes[len(layers) :]:
        axis.set_axis_off()
    figure.suptitle(title or f"{type(model).__name__}: groups in colour, pruned kernels grey", fontsize=10)
    return _save(figure, path)


def draw_overview(rows: Sequence[LayerRow], path: str | Path, title: str = "") -> Path:
    """Draw two bars per layer: multiply-adds before (grey) and after pruning, and the share that is left.

    rows: of ``layer_rows``. path: .png, .pdf or .svg.
    Raises DSPPruningError for no rows, DSPError if matplotlib is missing or the file cannot be written.
    """
    if not rows:
        raise DSPPruningError("no packed layer: there is nothing to draw")
    figure = _figure(8, _ROW * len(rows) + 1.2)
    amounts, shares = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    places = range(len(rows))
    amounts.barh(places, [row.dense_macs / 1e6 for row in rows], color=_DENSE, label="dense")
    amounts.barh(places, [row.macs / 1e6 for row in rows], color=_COLOURS[0], label="kept")
    shares.barh(places, [100 * row.kept for row in rows], color=_COLOURS[0])
    amounts.set_yticks(places, [_short(row.name, 40) for row in rows], fontsize=6)
    amounts.set_ylim(len(rows) - 0.4, -0.6)
    amounts.set_xlabel("million multiply-adds per image", fontsize=7)
    shares.set_xlim(0, 100)
    shares.set_xlabel("% kept", fontsize=7)
    mean = 100 * sum(row.macs for row in rows) / max(sum(row.dense_macs for row in rows), 1)
    shares.axvline(mean, color="black", linewidth=0.8)
    shares.set_title(f"all together {mean:.1f} %", fontsize=7)
    amounts.legend(fontsize=6, loc="best")
    for axis in (amounts, shares):
        axis.tick_params(labelsize=6)
    if title:
        figure.suptitle(title, fontsize=9)
    return _save(figure, path)


def _packed_layers(model: nn.Module, otherwise: str) -> dict[str, PackedConv2d]:
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedConv2d)}
    if not packed:
        raise DSPPruningError(f"{type(model).__name__} holds no PackedConv2d: {otherwise}")
    return packed


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DSPError("pictures need matplotlib: pip install 'dsp-kernels[cli]'") from error
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, path: str | Path) -> Path:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with whole_file(target) as temporary:
            figure.savefig(temporary, dpi=200)
    except (ValueError, OSError) as error:  # ValueError: an ending that matplotlib does not know
        raise DSPError(f"cannot write the picture {target}: {error}") from error
    return target


def _group_matrix(structure: GroupStructure) -> Tensor:
    """uint8 (out_channels, in_channels): 0 where there is no kernel, else 1 + the colour of its group."""
    marks = [
        torch.full((len(g.out_index), len(g.in_index)), 1 + number % len(_COLOURS), dtype=torch.uint8)
        for number, g in enumerate(structure.groups)
    ]
    return dense_weight(structure, marks, ())


def _short(name: str, most: int) -> str:
    """The end of a long dotted name, which tells layers apart."""
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _output_sizes(model: nn.Module, example_input: Example) -> dict[nn.Module, tuple[int, int]]:
    """(height, width) of the output of each convolution; (1, vectors per image) of a linear layer."""
    layers = [m for m in model.modules() if isinstance(m, PackedConv2d | nn.Conv2d | nn.Linear)]
    shapes = run_shapes(model, layers, as_inputs(example_input)).items()
    return {
        layer: (1, math.prod(output[1:-1])) if isinstance(layer, nn.Linear) else (output[2], output[3])
        for layer, (_, output) in shapes
    }
