"""Results as text: cells of a table, CSV, Markdown, and the table of the README."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from dsp_kernels.errors import DSPFormatError

from .results import Result, Run
from .rows import Row

__all__ = [
    "COLUMNS",
    "README_MARKERS",
    "cells",
    "csv_text",
    "machine",
    "markdown",
    "put_into_readme",
    "summary",
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
    "% of floor",
    "max difference",
    "build s",
    "peak MiB",
    "note",
)
README_MARKERS = ("<!-- results -->", "<!-- /results -->")


def cells(run: Run) -> list[tuple[str, ...]]:
    """One line of text cells for each row, in COLUMNS; faster is against ``Run.baseline``."""
    return [_line(run, row) for row in run.rows]


def _line(run: Run, row: Row) -> tuple[str, ...]:
    difference = "not compared" if row.difference is None else f"{row.difference:.1e}"
    if row.samples is None:
        empty = [""] * 10
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
        _number(None if row.of_floor is None else 100 * row.of_floor, ".0f"),
        difference,
        _number(row.build_seconds, ".1f"),
        _number(None if row.peak_bytes is None else row.peak_bytes / 2**20, ".0f"),
        f"no verdict: {samples.unstable}" if samples.unstable else "",
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


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
    parts += [f"## {run.label}, {run.mode}\n\n{_table(COLUMNS, cells(run))}" for run in result.runs]
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


def summary(result: Result) -> str:
    """For the README: per network the median of every engine at every batch size, and what did not run."""
    parts = [machine(result)]
    for run in result.runs:
        batches = run.batches
        engines = list(dict.fromkeys(row.engine for row in run.rows if row.samples is not None))
        found = {(row.engine, row.batch): row for row in run.rows if row.samples is not None}
        lines = []
        for engine in engines:
            rows = [found.get((engine, batch)) for batch in batches]
            lines.append((engine, *(_summary_cell(run, row) for row in rows)))
        ideal = "" if run.flop_ratio is None else f" The FLOPs alone promise {run.flop_ratio:.2f}x."
        parts.append(
            f"**{run.label}**: median ms (times as fast as the fastest dense float32 engine).{ideal}\n\n"
            + _table(("engine", *(f"batch {batch}" for batch in batches)), lines)
        )
    unstable = any(
        row.samples is not None and row.samples.unstable for run in result.runs for row in run.rows
    )
    if unstable:
        parts.append("A number with ~ was unstable (its samples spread or drift too much): no verdict.")
    reasons = {
        row.runner or row.engine: row.reason
        for run in result.runs
        for row in run.rows
        if row.status in ("unavailable", "wrong", "failed")
    }
    if reasons:
        parts.append("Not measured: " + "; ".join(f"{name} ({why})" for name, why in reasons.items()) + ".")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _summary_cell(run: Run, row: Row | None) -> str:
    if row is None:
        return "-"
    faster = run.speed_up(row)
    unsure = "~" if row.timed.unstable else ""
    return f"{unsure}{1e3 * row.timed.median:.3g}" + ("" if faster is None else f" ({faster:.2f}x)")


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    def row(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rule = "|" + "|".join("---" if not number else "---:" for number in range(len(columns))) + "|"
    return "\n".join([row(columns), rule, *(row(line) for line in lines)]) + "\n"


def put_into_readme(readme: str, result: Result) -> str:
    """The README with ``summary`` between its markers. Raises DSPFormatError where they are missing."""
    start, end = README_MARKERS
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(readme):
        raise DSPFormatError(f"the README has no place for results: expected {start} ... {end}")
    block = f"{start}\n{summary(result)}{end}"
    return pattern.sub(lambda _: block, readme, count=1)
