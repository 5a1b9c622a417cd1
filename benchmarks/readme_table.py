"""The README's table: a line for each network and batch size, the most telling engines beside each other."""

from __future__ import annotations

import re

from dsp_kernels.errors import DSPFormatError

from .report import machine, table
from .results import Result
from .rows import Row

__all__ = ["README_MARKERS", "put_into_readme", "summary"]

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
