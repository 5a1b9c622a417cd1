"""Plots of a result: latency over batch size, and the roofline."""

import io
import itertools
from collections.abc import Mapping
from typing import Any

from dsp_kernels.errors import DSPError

from .results import Result, Row, Run

# Colour-blind safe (Okabe and Ito 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one for each network
_Shown = dict[str, list[Row]]  # timed rows by engine


def draw_plots(result: Result) -> dict[str, bytes]:
    """PNG files by caption. Raises DSPError if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DSPError("plots need matplotlib: pip install 'dsp-kernels[cli]'") from error
    runs = [(run, _shown(run)) for run in result.runs if any(row.samples for row in run.rows)]
    if not runs:
        return {}
    names = dict.fromkeys(name for _, shown in runs for name in shown)
    colours = dict(zip(names, itertools.cycle(_COLOURS), strict=False))
    latency = Figure(figsize=(6.2 * len(runs), 4.8), layout="constrained")
    for axis, (run, shown) in zip(latency.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        _latency(axis, run, shown, colours)
    plots = {"Latency over batch size: of each form the fastest engine, and all fused ones": latency}
    if result.peaks is not None:
        caption = "Roofline: useful FLOP/s against arithmetic intensity, with the measured peak and bandwidth"
        plots[caption] = Figure(figsize=(10, 4.8), layout="constrained")
        _roofline(plots[caption].subplots(), runs, colours, result.peaks)
    return {caption: _png(figure) for caption, figure in plots.items()}


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return file.getvalue()


def _shown(run: Run) -> _Shown:
    """Of each form the fastest engine at the largest batch, and all fused ones."""
    best: dict[str, Row] = {}
    for row in run.rows:
        if row.batch == run.batches[-1] and row.samples is not None:
            kind = row.engine if "fused" in row.engine else (row.form or row.engine)
            if kind not in best or row.samples.median < best[kind].timed.median:
                best[kind] = row
    names = [row.engine for row in best.values()][: len(_COLOURS)]
    return {name: [row for row in run.rows if row.engine == name and row.samples] for name in names}


def _latency(axis: Any, run: Run, shown: _Shown, colours: Mapping[str, str]) -> None:
    for name, rows in shown.items():
        batches = [row.batch for row in rows]
        axis.plot(batches, [1e3 * row.timed.median for row in rows], "o-", color=colours[name], label=name)
        low, high = ([1e3 * row.timed.quantile(share) for row in rows] for share in (0.1, 0.9))
        axis.fill_between(batches, low, high, color=colours[name], alpha=0.15)
    axis.set(xscale="log", yscale="log", xlabel="batch size", ylabel="ms per batch, median and p10-p90")
    axis.set_xticks(run.batches, [str(batch) for batch in run.batches])
    axis.set_title(run.label, fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)


def _roofline(
    axis: Any, runs: list[tuple[Run, _Shown]], colours: Mapping[str, str], peaks: Mapping[str, Any]
) -> None:
    """Useful GFLOP/s against useful FLOP per byte that must move, at the largest batch size."""
    most = 1.0
    for (run, shown), marker in zip(runs, itertools.cycle(_MARKERS), strict=False):
        for name, rows in shown.items():
            row = max(rows, key=lambda row: row.batch)
            if row.macs and row.moved:
                flops = 2.0 * row.macs * row.batch
                most = max(most, flops / row.moved)
                point = [flops / row.moved], [1e-9 * flops / row.timed.median]
                axis.plot(*point, marker, color=colours[name], label=f"{name}, {run.name}", alpha=0.8)
    bandwidth = 1e-9 * peaks["bandwidth"]
    for (name, flops), style in zip(peaks["flops"].items(), ("-", "--", ":"), strict=False):
        ridge = 1e-9 * flops / bandwidth
        xs = [min(1.0, ridge / 2), ridge, max(2 * most, 2 * ridge)]
        ys = [bandwidth * xs[0], 1e-9 * flops, 1e-9 * flops]
        axis.plot(xs, ys, style, color="black", linewidth=1, label=f"measured {name} peak and copy bandwidth")
    xlabel = "useful FLOP per byte that has to move (image, weights, logits)"
    axis.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="useful GFLOP/s")
    axis.set_title("Roofline, largest batch size", fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
