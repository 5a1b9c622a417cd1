"""What pruning kept of every layer, as plain numbers and as a table to print."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["PruningReport", "RoundingCost"]

_COLUMNS = ("layer", "filters", "channels", "per group", "kernels", "MACs kept", "note")


@dataclass(frozen=True)
class RoundingCost:
    """What it cost to keep multiples of channels, beside the same rate without rounding.

    multiple: of channels per group. beta, energy: threshold, and share of the sum of squares pruned (0..1);
    unrounded_*: the same without rounding. exceptions: groups that keep another number than a multiple,
    because fewer channels were left to choose from.
    """

    multiple: int
    beta: float
    unrounded_beta: float
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

    beta: the threshold, None if masks were loaded. pruned_flops, pruned_params: percent of the chosen layers.
    note: why layers were pruned by their own masks alone, or empty.
    layers: one row per layer, see ``PruneWrapper.summary``.
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
        rows = [_COLUMNS, *(_cells(row) for row in self.layers)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
        lines += [
            "  ".join(
                cell.ljust(width) if column in (0, len(_COLUMNS) - 1) else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join(lines)


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
