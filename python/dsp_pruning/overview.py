"""One picture of where a packed network's multiply-adds are, and what share of them each layer kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsp_kernels.errors import DSPError, DSPPruningError
from dsp_pruning.report import LayerRow, save_figure, short_name

__all__ = ["draw_overview"]

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
