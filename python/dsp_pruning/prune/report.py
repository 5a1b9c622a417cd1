"""What pruning kept of every layer, as plain numbers and as a table to print."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dsp_pruning.layers import LayerInfo
from dsp_pruning.prune.rule import Masks, hard_groups
from dsp_pruning.prune.search import pruned_share
from dsp_pruning.table import text_table

_COLUMNS = ("layer", "filters", "channels", "per group", "kernels", "MACs kept", "note")


@dataclass(frozen=True)
class RoundingCost:
    """The cost of keeping multiples of channels, compared with the same rate without rounding.

    multiple: of channels per group. energy, unrounded_energy: share of the sum of squared weights that is
    pruned, 0 to 1, with and without rounding. exceptions: groups that keep another number, because fewer
    channels were left to choose from.
    """

    multiple: int
    energy: float
    unrounded_energy: float
    exceptions: int

    def __str__(self) -> str:
        return (
            f"multiples of {self.multiple} channels: {100 * self.energy:.2f} % of the weights' energy "
            f"pruned, {100 * self.unrounded_energy:.2f} % without rounding; {self.exceptions} groups keep "
            "another number"
        )


@dataclass(frozen=True)
class PruningReport:
    """What the masks keep.

    beta: the threshold, None for loaded masks. pruned_flops, pruned_params: percent over the chosen layers.
    note: why layers were pruned without channel flow, or empty. layers: one row per layer, see
    ``PruneWrapper.summary``.
    """

    beta: float | None
    pruned_flops: float
    pruned_params: float
    note: str
    layers: tuple[Mapping[str, Any], ...]
    rounding: RoundingCost | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.pruned_flops:.2f} % of the FLOPs and {self.pruned_params:.2f} % of the parameters of "
            f"{len(self.layers)} layers pruned" + ("" if self.beta is None else f" at beta = {self.beta:.4f}")
        ]
        lines += [str(self.rounding)] if self.rounding is not None else []
        lines += [self.note] if self.note else []
        return "\n".join([*lines, text_table([_COLUMNS, *map(_cells, self.layers)])])


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    sizes = row["group_channels"]
    return (
        row["name"] + (" (f)" if row["prunes_filters"] else ""),
        f"{row['filters_kept']}/{row['filters']}",
        f"{row['channels_kept']}/{row['channels']}",
        " ".join(str(size) for size in sizes) if len(sizes) <= 8 else f"{min(sizes)}..{max(sizes)}",
        f"{row['kernels_kept']}/{row['kernels']}",
        f"{100 * row['macs_kept'] / row['macs']:.1f} %",
        row["note"],
    )


def layer_row(
    layer: LayerInfo, mask: Tensor, prunes_filters: bool, note: str
) -> dict[str, int | str | bool | list[int]]:
    """Plain numbers and text: one layer's sizes, each with what mask [O, C] keeps of it."""
    logits = layer.conv.get_buffer("group")
    groups = hard_groups(logits)[mask.any(1)]
    return {
        "name": layer.name,
        "filters": layer.out_channels,
        "filters_kept": int(mask.any(1).sum()),
        "channels": layer.in_channels,
        "channels_kept": int(mask.any(0).sum()),
        "groups": len(logits),
        "groups_kept": len(groups.unique()),
        "group_channels": [int(mask[mask.any(1)][groups == g].any(0).sum()) for g in groups.unique()],
        "kernels": mask.numel(),
        "kernels_kept": int(mask.sum()),
        "macs": layer.macs,
        "macs_kept": layer.kernel_macs * int(mask.sum()),
        "prunes_filters": prunes_filters,
        "note": note,
    }


def percent_pruned(layers: Sequence[LayerInfo], masks: Masks) -> tuple[float, float]:
    """Multiply-adds and weights that are pruned, each in percent over these layers."""
    return 100 * pruned_share(layers, masks, "macs"), 100 * pruned_share(layers, masks, "params")
