"""Results as text: cells of a table, CSV and Markdown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from dsp_kernels.errors import DSPFormatError

from .results import Result, Row, Run

__all__ = [
    "COLUMNS",
    "README_MARKERS",
    "cells",
    "csv_text",
    "machine",
    "markdown",
    "put_into_readme",
    "summary",
    "table",
]

COLUMNS = (
    "engine",
    "batch",
    "median ms",
    "p10",
    "p90",
    "p99",
    "CV %",
    "n",
    "images/s",
    "times faster",
    "ideal",
    "% of ideal",
    "% of floor",
    "accuracy %",
    "max difference",
    "build s",
    "peak MiB",
    "note",
)


def cells(run: Run) -> list[tuple[str, ...]]:
    """One line of text cells for each row, in COLUMNS; faster is against ``Run.baseline``."""
    return [_line(run, row) for row in run.rows]


def _line(run: Run, row: Row) -> tuple[str, ...]:
    difference = "not compared" if row.difference is None else f"{row.difference:.1e}"
    if row.samples is None:
        empty = [""] * 12
        return (row.engine, str(row.batch), *empty, difference, "", "", f"{row.status}: {row.reason}")
    samples = row.samples
    times = (samples.median, samples.p10, samples.p90, samples.p99)
    return (
        row.engine,
        str(row.batch),
        *(f"{1e3 * seconds:.3g}" for seconds in times),
        f"{100 * samples.variation:.1f}",
        str(samples.n),
        f"{row.batch / samples.median:.0f}",
        _number(run.speed_up(row), ".2f"),
        _number(run.ideal(row), ".2f"),
        _percent(_of_ideal(run, row), ".0f"),
        _percent(row.of_floor, ".0f"),
        _percent(row.accuracy, ".2f"),
        difference,
        _number(row.build_seconds, ".1f"),
        _number(None if row.peak_bytes is None else row.peak_bytes / 2**20, ".0f"),
        f"no verdict: {samples.unstable}" if samples.unstable else "",
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(share: float | None, form: str) -> str:
    return _number(None if share is None else 100 * share, form)


def _of_ideal(run: Run, row: Row) -> float | None:
    """The speed-up over the one that the FLOPs alone promise."""
    faster, ideal = run.speed_up(row), run.ideal(row)
    return None if faster is None or not ideal else faster / ideal


def csv_text(result: Result) -> str:
    """Every row of every run with all its numbers, one header."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("network", "mode", *COLUMNS))
    for run in result.runs:
        writer.writerows((run.name, run.mode, *line) for line in cells(run))
    return file.getvalue()


def markdown(result: Result) -> str:
    """A document with the machine and a whole table for each run."""
    parts = [f"# Benchmarks\n\n{machine(result)}\n"]
    parts += [f"## {run.label}, {run.mode}\n\n{table(COLUMNS, cells(run))}" for run in result.runs]
    return "\n".join(parts)


def machine(result: Result) -> str:
    """One sentence: where, with what, when."""
    about = result.environment
    where = about.get("accelerator") or f"{about['processor']}, {about['threads']} threads"
    packages = about.get("packages", {})
    versions = [f"torch {about['torch']}"]
    versions += [f"{name} {packages[name]}" for name in ("openvino", "onnxruntime") if name in packages]
    text = f"{where}; {', '.join(versions)}; {about['time'][:10]}, commit {about.get('commit') or 'unknown'}."
    if result.peaks is not None:
        flops = ", ".join(
            f"{1e-9 * value:.0f} GFLOP/s {name}" for name, value in result.peaks["flops"].items()
        )
        text += f" Measured peaks: {flops}, {1e-9 * result.peaks['bandwidth']:.0f} GB/s copy."
    return text


def table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, numbers to the right."""

    def row(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rule = "|" + "|".join("---" if not number else "---:" for number in range(len(columns))) + "|"
    return "\n".join([row(columns), rule, *(row(line) for line in lines)]) + "\n"


README_MARKERS = ("<!-- results -->", "<!-- /results -->")
_OURS = "packed/fused:cpu"
_SHOWN = {
    "released form": "released/torchscript",
    "packed, torch": "packed/torch",
    "fused, eager": "packed/fused:eager",
    "fused, native": _OURS,
}


def summary(result: Result) -> str:
    """Median milliseconds of one batch, and how many times as fast the native fused network is."""
    lines, unsure = [], False
    for run in result.runs:
        for batch in run.batches:
            rows = {row.engine: row for row in run.rows if row.batch == batch and row.samples is not None}
            best = run.baseline(batch)
            ours = rows.get(_OURS)
            unsure = unsure or any(rows[name].timed.unstable for name in _SHOWN.values() if name in rows)
            lines.append(
                (
                    run.name if run.mode == "latency" else f"{run.name}, {run.mode}",
                    str(batch),
                    "-" if best is None else f"{_median(best)} ({best.runner})",
                    *(_median(rows.get(name)) for name in _SHOWN.values()),
                    _ratio(best, ours),
                    _ratio(rows.get(_SHOWN["released form"]), ours),
                    "-" if run.flop_ratio is None else f"{run.flop_ratio:.2f}x",
                    "-" if ours is None or ours.of_floor is None else f"{100 * ours.of_floor:.0f} %",
                )
            )
    columns = ("network", "batch", "dense, fastest", *_SHOWN)
    columns += ("native : dense", "native : released", "FLOP ratio", "of floor")
    text = f"{machine(result)} Median milliseconds of a batch, float32.\n\n{table(columns, lines)}"
    if unsure:
        text += "\n~: the samples spread or drift too much for a verdict.\n"
    return text


def put_into_readme(readme: str, result: Result) -> str:
    """The README with ``summary`` between its markers. Raises DSPFormatError where they are missing."""
    start, end = README_MARKERS
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(readme):
        raise DSPFormatError(f"the README has no place for results: expected {start} ... {end}")
    block = f"{start}\n{summary(result)}{end}"
    return pattern.sub(lambda _: block, readme, count=1)


def _median(row: Row | None) -> str:
    if row is None:
        return "-"
    return ("~" if row.timed.unstable else "") + f"{1e3 * row.timed.median:.3g}"


def _ratio(slow: Row | None, fast: Row | None) -> str:
    if slow is None or fast is None:
        return "-"
    return f"{slow.timed.median / fast.timed.median:.2f}x"
