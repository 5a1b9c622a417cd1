"""Pictures of a result: latency and throughput over batch size, speed-up against FLOP ratio, roofline."""

from __future__ import annotations

import io
import itertools
from typing import Any

from dsp_kernels.errors import DSPError

from .results import Result, Row, Run

__all__ = ["draw_plots"]

# Colour-blind safe (Okabe and Ito 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")  # one for each network
_MOST_LINES = 8


def draw_plots(result: Result) -> dict[str, bytes]:
    """PNG files by name. Raises DSPError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DSPError("pictures need matplotlib: pip install 'dsp-kernels[cli]'") from error
    timed = [run for run in result.runs if any(row.samples is not None for row in run.rows)]
    pictures: dict[str, bytes] = {}
    if not timed:
        return pictures
    for name, draw in (("latency", _latency), ("throughput", _throughput)):
        figure = Figure(figsize=(6.2 * len(timed), 4.6), layout="constrained")
        for axis, run in zip(figure.subplots(1, len(timed), squeeze=False)[0], timed, strict=True):
            draw(axis, run)
        pictures[name] = _png(figure)
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    _speed_up(figure.subplots(), timed)
    pictures["speed_up"] = _png(figure)
    if result.peaks is not None:
        figure = Figure(figsize=(10, 5), layout="constrained")
        _roofline(figure.subplots(), timed, result.peaks)
        pictures["roofline"] = _png(figure)
    return pictures


def _shown(run: Run) -> list[str]:
    """Engines worth a line: of each form the fastest at the largest batch, and all of ours."""
    best: dict[str, Row] = {}
    largest = run.batches[-1]
    for row in run.rows:
        if row.batch == largest and row.samples is not None:
            kind = row.engine if "fused" in row.engine else (row.form or row.engine)
            if kind not in best or row.samples.median < best[kind].timed.median:
                best[kind] = row
    return [row.engine for row in best.values()][:_MOST_LINES]


def _lines(run: Run) -> list[tuple[str, str, list[Row]]]:
    return [
        (name, colour, [row for row in run.rows if row.engine == name and row.samples is not None])
        for name, colour in zip(_shown(run), _COLOURS, strict=False)
    ]


def _latency(axis: Any, run: Run) -> None:
    for name, colour, rows in _lines(run):
        batches = [row.batch for row in rows]
        axis.plot(batches, [1e3 * row.timed.median for row in rows], "o-", color=colour, label=name)
        low, high = [[1e3 * getattr(row.timed, p) for row in rows] for p in ("p10", "p90")]
        axis.fill_between(batches, low, high, color=colour, alpha=0.15)
    _finish(axis, run, "ms per batch, median and p10-p90")


def _throughput(axis: Any, run: Run) -> None:
    for name, colour, rows in _lines(run):
        rates = [row.batch / row.timed.median for row in rows]
        axis.plot([row.batch for row in rows], rates, "o-", color=colour, label=name)
    _finish(axis, run, "images per second")


def _finish(axis: Any, run: Run, ylabel: str) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(run.batches, [str(batch) for batch in run.batches])
    axis.set_xlabel("batch size")
    axis.set_ylabel(ylabel)
    axis.set_title(run.label, fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)


def _speed_up(axis: Any, runs: list[Run]) -> None:
    named: set[str] = set()
    colours: dict[str, str] = {}
    for run in runs:
        if run.flop_ratio is None:
            continue
        for name in _shown(run):
            colours.setdefault(name, _COLOURS[len(colours) % len(_COLOURS)])
            for row in run.rows:
                faster = run.speed_up(row)
                if row.engine != name or faster is None:
                    continue
                label = None if name in named else name
                named.add(name)
                ideal = run.ideal(row)
                axis.scatter(ideal, faster, 12 + 6 * row.batch**0.5, colours[name], alpha=0.7, label=label)
    most = max([run.flop_ratio or 1 for run in runs]) * 1.1
    axis.plot([1, most], [1, most], color="black", linewidth=1, label="what the FLOPs promise")
    axis.set_xlabel("FLOP ratio, dense : pruned")
    axis.set_ylabel("times as fast as the fastest dense float32 engine")
    axis.set_title("Speed-up against FLOP ratio (larger dot: larger batch)", fontsize=10)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)


def _roofline(axis: Any, runs: list[Run], peaks: dict[str, Any]) -> None:
    """Useful GFLOP/s against useful FLOP per byte that must move, at the largest batch size."""
    colours: dict[str, str] = {}
    most = 1.0
    for run, mark in zip(runs, itertools.cycle(_MARKS), strict=False):
        for name in _shown(run):
            colour = colours.setdefault(name, _COLOURS[len(colours) % len(_COLOURS)])
            for row in run.rows:
                known = row.engine == name and row.batch == run.batches[-1] and row.samples is not None
                if known and row.macs and row.moved:
                    flops = 2.0 * row.macs * row.batch
                    rate = 1e-9 * flops / row.timed.median
                    intensity = flops / row.moved
                    most = max(most, intensity)
                    label = f"{name}, {run.name}"
                    axis.plot([intensity], [rate], mark, color=colour, label=label, alpha=0.8)
    bandwidth = 1e-9 * peaks["bandwidth"]
    for (name, flops), style in zip(peaks["flops"].items(), ("-", "--", ":"), strict=False):
        ridge = 1e-9 * flops / bandwidth
        xs = [min(1.0, ridge / 2), ridge, max(2 * most, 2 * ridge)]
        ys = [bandwidth * xs[0], 1e-9 * flops, 1e-9 * flops]
        label = f"measured {name} peak and copy bandwidth"
        axis.plot(xs, ys, style, color="black", linewidth=1, label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("useful FLOP per byte that has to move (image, weights, logits)")
    axis.set_ylabel("useful GFLOP/s")
    axis.set_title("Roofline, largest batch size", fontsize=10)
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return file.getvalue()
