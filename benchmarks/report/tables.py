"""Results as text: the cells of a table, Markdown, and the table of the README."""

from collections.abc import Callable, Iterable, Sequence

from dsp_kernels.errors import DSPFormatError

from ..subjects.networks import GENERATED
from .results import Result, Row, Run


def _number(value: float | None, form: str, scale: float = 1) -> str:
    return "" if value is None else format(scale * value, form)


def _quotient(part: float | None, whole: float | None) -> float | None:
    return part / whole if part and whole else None


_BUSY = 1.2  # a quiet machine's probe varies by less
_TIMED: dict[str, Callable[[Run, Row], str]] = {  # cells of a timed row
    "median ms": lambda run, row: _number(row.timed.median, ".3g", 1e3),
    "p10": lambda run, row: _number(row.timed.quantile(0.1), ".3g", 1e3),
    "p90": lambda run, row: _number(row.timed.quantile(0.9), ".3g", 1e3),
    "p99": lambda run, row: _number(row.timed.quantile(0.99), ".3g", 1e3),
    "CV %": lambda run, row: _number(row.timed.variation, ".1f", 100),
    "n": lambda run, row: str(row.timed.n),
    "images/s": lambda run, row: _number(row.batch / row.timed.median, ".0f"),
    "times faster": lambda run, row: _number(run.speed_up(row), ".2f"),
    "ideal": lambda run, row: _number(run.ideal(row), ".2f"),
    "% of ideal": lambda run, row: _number(_quotient(run.speed_up(row), run.ideal(row)), ".0f", 100),
    "% of floor": lambda run, row: _number(row.of_floor, ".0f", 100),
    "accuracy %": lambda run, row: _number(row.accuracy, ".2f", 100),
}
COLUMNS = ("engine", "batch", *_TIMED, "max difference", "build s", "note")


def cells(run: Run) -> list[tuple[str, ...]]:
    """One line of text cells in COLUMNS for each row; "times faster" is against ``Run.baseline``."""
    lines = []
    for row in run.rows:
        timed = row.samples is not None
        note = f"{row.status}: {row.reason}"
        if timed:
            unstable, busy = row.timed.unstable, row.timed.busy or 1
            notes = (
                f"no verdict: {unstable}" * bool(unstable),
                f"the machine was busy: x{busy:.1f}" * (busy > _BUSY),
            )
            note = "; ".join(filter(None, notes))
        difference = "not compared" if row.difference is None else f"{row.difference:.1e}"
        numbers = [cell(run, row) if timed else "" for cell in _TIMED.values()]
        built = _number(row.build_seconds if timed else None, ".1f")
        lines.append((row.engine, str(row.batch), *numbers, difference, built, note))
    return lines


def markdown(result: Result) -> str:
    """A document with the machine and the whole table of each run."""
    parts = [f"# Benchmarks\n\n{machine(result)}\n"]
    parts += [f"## {run.label}, {run.mode}\n\n{_table(COLUMNS, cells(run))}" for run in result.runs]
    return "\n".join(parts)


def machine(result: Result) -> str:
    """One sentence: processor, versions, date, commit, peaks."""
    about = result.environment
    where = about.get("accelerator") or f"{about['processor']}, {about['threads']} threads"
    packages = about.get("packages", {})
    versions = [f"torch {about['torch']}"]
    versions += [f"{name} {packages[name]}" for name in ("openvino", "onnxruntime") if name in packages]
    text = f"{where}; {', '.join(versions)}; {about['time'][:10]}, commit {about.get('commit') or 'unknown'}."
    if result.peaks is not None:
        rates = [f"{1e-9 * value:.0f} GFLOP/s {name}" for name, value in result.peaks["flops"].items()]
        copied = f"{1e-9 * result.peaks['bandwidth']:.0f} GB/s copy"
        text += f" Measured peaks: {', '.join([*rates, copied])}."
    return text


def _table(columns: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table: the first column to the left, numbers to the right."""

    def row(texts: Sequence[str]) -> str:
        return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"

    rule = "|---|" + "---:|" * (len(columns) - 1)
    return "\n".join([row(columns), rule, *(row(line) for line in lines)]) + "\n"


README_MARKERS = ("<!-- results -->", "<!-- /results -->")
_RELEASED, _OURS = "released/torchscript", "packed/fused:cpu"
_INT8, _OUR_INT8 = "dense/openvino-int8", "packed/fused:cpu:int8"
_SHOWN = {"released form": _RELEASED, "fused": _OURS, "dense int8": _INT8, "fused int8": _OUR_INT8}
_README_COLUMNS = (
    "network",
    "batch",
    "dense, fastest",
    *_SHOWN,
    "fused : dense",
    "fused : released",
    "int8 : dense int8",
    "FLOP ratio",
    "share of the floor",
)


def summary(result: Result) -> str:
    """The README's table: median milliseconds of a batch, and how much faster the fused network is."""
    lines = [_summary_line(run, batch) for run in result.runs for batch in run.batches]
    head = f"{machine(result)} Median milliseconds of a batch, float32 where no other is named."
    text = f"{head}\n\n{_table(_README_COLUMNS, lines)}"
    if any("~" in cell for line in lines for cell in line):
        text += "\n~: the samples spread or drift too much for a verdict.\n"
    if any(GENERATED in run.name for run in result.runs):
        text += (
            "\ngenerated: the released network was not found (`dsp download all` fetches it); these random"
            " weights and groups from a seed have the published numbers of groups and multiply-adds.\n"
        )
    busy = max((row.timed.busy or 1 for run in result.runs for row in run.rows if row.samples), default=1)
    if busy > _BUSY:
        text += (
            "\nThe machine was busy, not equally for all engines: a fixed computation beside the calls took "
            f"up to x{busy:.1f} of its best, so ratios are approximate.\n"
        )
    return text


def _summary_line(run: Run, batch: int) -> tuple[str, ...]:
    rows = {row.engine: row for row in run.rows if row.batch == batch and row.samples is not None}
    best, ours = run.baseline(batch), rows.get(_OURS)
    return (
        run.name if run.mode == "latency" else f"{run.name}, {run.mode}",
        str(batch),
        "-" if best is None else f"{_median(best)} ({best.runner})",
        *(_median(rows.get(name)) for name in _SHOWN.values()),
        _ratio(best, ours),
        _ratio(rows.get(_RELEASED), ours),
        _ratio(rows.get(_INT8), rows.get(_OUR_INT8)),
        "-" if run.flop_ratio is None else f"{run.flop_ratio:.2f}x",
        "-" if ours is None or ours.of_floor is None else f"{100 * ours.of_floor:.0f} %",
    )


def put_into_readme(readme: str, result: Result) -> str:
    """The README with ``summary`` between its markers. Raises DSPFormatError if they are missing."""
    start, end = README_MARKERS
    before, _, rest = readme.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise DSPFormatError(f"the README has no place for results: expected {start} ... {end}")
    return f"{before}{start}\n{summary(result)}{end}{after}"


def _median(row: Row | None) -> str:
    if row is None:
        return "-"
    return ("~" if row.timed.unstable else "") + f"{1e3 * row.timed.median:.3g}"


def _ratio(slow: Row | None, fast: Row | None) -> str:
    if slow is None or fast is None:
        return "-"
    unsure = slow.timed.unstable or fast.timed.unstable
    return ("~" if unsure else "") + f"{slow.timed.median / fast.timed.median:.2f}x"
