"""Results as text: cells of a table, CSV and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

from .results import Result, Run
from .rows import Row

__all__ = [
    "COLUMNS",
    "cells",
    "csv_text",
    "machine",
    "markdown",
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
