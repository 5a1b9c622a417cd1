"""Plots of a result: latency over batch size, speed-up against FLOP ratio, roofline."""

import io
import itertools
from collections.abc import Callable, Mapping
from typing import Any

from dsp_kernels.errors import DSPError

from .results import Result, Row, Run

# Colour-blind safe (Okabe and Ito 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one for each network
_Shown = dict[str, list[Row]]  # timed rows by engine


def draw_plots(result: Result) -> dict[str, bytes]:
    """PNG files by caption. Raises DSPError if matplotlib is missing."""
    runs = [(run, _shown(run)) for run in result.runs if any(row.samples for row in run.rows)]
    if not runs:
        return {}
    names = dict.fromkeys(name for _, shown in runs for name in shown)
    colours = dict(zip(names, itertools.cycle(_COLOURS), strict=False))

    def latency(axes: Any) -> None:
        for axis, (run, shown) in zip(axes, runs, strict=True):
            _latency(axis, run, shown, colours)

    plots = {
        "Latency over batch size: of each form the fastest engine, and all fused ones": _png(
            latency, len(runs), 6.2 * len(runs)
        ),
        "Speed-up against FLOP ratio": _png(lambda axes: _speed_up(axes[0], runs, colours), 1, 7),
    }
    if (peaks := result.peaks) is not None:
        caption = "Roofline: useful FLOP/s against arithmetic intensity, with the measured peak and bandwidth"
        plots[caption] = _png(lambda axes: _roofline(axes[0], runs, colours, peaks), 1, 10)
    return plots


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


def _png(draw: Callable[[Any], None], columns: int, width: float) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DSPError("plots need matplotlib: pip install 'dsp-kernels[cli]'") from error
    figure = Figure(figsize=(width, 4.8), layout="constrained")
    draw(figure.subplots(1, columns, squeeze=False)[0])
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return file.getvalue()


def _latency(axis: Any, run: Run, shown: _Shown, colours: Mapping[str, str]) -> None:
    for name, rows in shown.items():
        batches = [row.batch for row in rows]
        axis.plot(batches, [1e3 * row.timed.median for row in rows], "o-", color=colours[name], label=name)
        low, high = ([1e3 * row.timed.quantile(share) for row in rows] for share in (0.1, 0.9))
        axis.fill_between(batches, low, high, color=colours[name], alpha=0.15)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(run.batches, [str(batch) for batch in run.batches])
    _finish(axis, run.label, "batch size", "ms per batch, median and p10-p90")


def _speed_up(axis: Any, runs: list[tuple[Run, _Shown]], colours: Mapping[str, str]) -> None:
    for run, shown in runs:
        for row in itertools.chain(*shown.values()):
            if (ideal := run.ideal(row)) is not None:
                size, colour = 12 + 6 * row.batch**0.5, colours[row.engine]
                axis.scatter(ideal, run.speed_up(row), size, colour, alpha=0.7, label=row.engine)
    most = max(run.flop_ratio or 1 for run, _ in runs) * 1.1
    axis.plot([1, most], [1, most], color="black", linewidth=1, label="what the FLOPs promise")
    title = "Speed-up against FLOP ratio (larger dot: larger batch)"
    _finish(axis, title, "FLOP ratio, dense : pruned", "times as fast as the fastest dense float32 engine")


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
    axis.set_xscale("log")
    axis.set_yscale("log")
    xlabel = "useful FLOP per byte that has to move (image, weights, logits)"
    _finish(axis, "Roofline, largest batch size", xlabel, "useful GFLOP/s")
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))


def _finish(axis: Any, title: str, xlabel: str, ylabel: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.3, which="both")
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=7)
