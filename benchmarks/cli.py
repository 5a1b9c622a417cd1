"""What the commands of ``python -m dsp_benchmarks`` do with their options."""

from __future__ import annotations

import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch

from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.whole_file import write_bytes, write_text

from .cases import Case, case_input
from .engines import ENGINES
from .engines.base import cuda_available
from .measure.environment import environment
from .measure.peaks import measure_peaks
from .measure.profiles import profile_engine
from .measure.timing import Progress, TimingRules
from .report import compare as comparing
from .report.compare import MIN_CHANGE, compare_results
from .report.page import html_page
from .report.plots import draw_plots
from .report.results import Result, Row, Run, read_result, write_result
from .report.tables import COLUMNS, cells, csv_text, machine, markdown, put_into_readme
from .run import Budget, Told, choose_cases, run_cases, with_floors
from .subjects.networks import Network, NetworkSource, load_network, shared_folder

__all__ = [
    "DEFAULT_RESULT",
    "MIN_CHANGE",
    "README",
    "README_RESULT",
    "bench_network",
    "check_options",
    "compare",
    "report",
    "run",
    "write_report",
]

HERE = Path(__file__).resolve().parent
README = HERE.parent / "README.md"
DEFAULT_RESULT = HERE / "results" / "default_cpu.json"  # of `make bench`
README_RESULT = HERE / "results" / "real_cpu.json"  # of `make bench-readme`: fewer engines, more samples
_BATCHES = (1, 8, 32, 128)
_SHORT_SECONDS = 270.0  # of the five-minute plan; starting Python and writing the page take the rest
_SHORT_WARMUP = 0.1  # seconds of each engine in that plan
_RESERVE = 15.0  # of the time, for measuring the peaks again, and for the page


def run(options: Namespace) -> int:
    """Time networks; the exit status is 1 where an engine was wrong or broke."""
    started = time.perf_counter()
    check_options(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device != "cpu":  # float32 means float32 in every row
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    sources = [
        NetworkSource(name, options.structure, options.image_size, options.seed)
        for name in options.net or _default_networks()
    ]
    if options.profile:
        return _profile(sources[0], options)
    cases = choose_cases(options.device, options.engine or (), options.form or ())
    networks = [(source, load_network(source)) for source in sources]
    modes = ("latency", "throughput") if options.mode == "both" else (options.mode,)
    before = measure_peaks(options.device, _dtypes(cases))
    seconds = options.seconds or (_SHORT_SECONDS if options.short else None)
    if seconds is not None:
        seconds = max(0.0, seconds - _RESERVE - (time.perf_counter() - started))
    budget = Budget(seconds, _weights([net for _, net in networks for _ in modes], cases, options))
    measured: list[tuple[Network, Run]] = []
    with _progress() as (progress, tell):
        for source, network in networks:
            for mode in modes:
                one = bench_network(
                    network, source, mode, options, cases, budget=budget, progress=progress, tell=tell
                )
                measured.append((network, one))
    # Measured again at the end: a machine that was busy once would make floors that engines beat.
    peaks = before.best(measure_peaks(options.device, _dtypes(cases)))
    runs = [replace(one, rows=tuple(with_floors(one.rows, net, peaks))) for net, one in measured]
    result = Result(environment(options.device), peaks.as_json(), tuple(runs))
    for one in runs:
        _print(f"{one.label}, {one.mode}, {torch.get_num_threads()} threads", COLUMNS, cells(one))
    print(machine(result))
    target = options.out or _default_target(sources, options.device)
    print(f"raw samples: {write_result(target, result)}")
    if options.report:
        print(f"page: {write_report(target, result)}")
    broken = [row for one in runs for row in one.rows if row.status in ("wrong", "failed")]
    for row in broken:
        print(f"error: {row.engine}, batch {row.batch}: {row.reason}", file=sys.stderr)
    return 1 if broken else 0


def bench_network(
    network: Network,
    source: NetworkSource,
    mode: str,
    options: Namespace,
    cases: Sequence[Case],
    *,
    budget: Budget | None = None,
    progress: Progress | None = None,
    tell: Told | None = None,
) -> Run:
    """One network in one mode ("latency" or "throughput")."""
    rules = TimingRules.throughput(rounds=min(options.rounds, 10)) if mode == "throughput" else TimingRules()
    if mode == "latency":
        rules = rules.with_rounds(options.rounds)
    rows: list[Row] = run_cases(
        network,
        sorted(options.batch or _BATCHES),
        cases,
        replace(rules, seed=options.seed, warmup=_SHORT_WARMUP if options.short else rules.warmup),
        device=options.device,
        isolate=source if options.isolate else None,
        short=options.short,
        budget=budget,
        progress=progress,
        tell=tell,
    )
    ratio = network.macs("dense") / network.macs("packed")
    return Run(Path(source.name).stem, network.label, mode, ratio, tuple(rows))


def compare(options: Namespace) -> int:
    """Hold two results against each other; the exit status is 1 where something became slower."""
    found = compare_results(
        read_result(options.first),
        read_result(options.second),
        alpha=options.alpha,
        min_change=options.min_change,
        other_machine=options.other_machine,
    )
    _print(f"{options.second} against {options.first}", *comparing.table(found))
    slower = [one for one in found if one.verdict == "slower"]
    undecided = sum(one.verdict.startswith("no verdict") for one in found)
    print(f"{len(slower)} slower, {undecided} without verdict, of {len(found)}")
    return 1 if slower else 0


def report(options: Namespace) -> int:
    """Write what was asked for from a result; without any flag, everything beside it."""
    source = options.result or (README_RESULT if options.readme else DEFAULT_RESULT)
    result = read_result(source)
    asked = (options.html, options.csv, options.markdown, options.plots, options.readme)
    if not any(asked):
        print(f"page: {write_report(source, result)}")
    if options.html:
        write_text(options.html, html_page(result, draw_plots(result)))
    if options.csv:
        write_text(options.csv, csv_text(result))
    if options.markdown:
        write_text(options.markdown, markdown(result))
    if options.plots:
        _write_pictures(options.plots, draw_plots(result))
    if options.readme:
        try:
            text = options.readme.read_text(encoding="utf-8")
        except OSError as error:
            raise DSPFormatError(f"cannot read {options.readme}: {error}") from error
        write_text(options.readme, put_into_readme(text, result))
    return 0


def write_report(json_file: Path, result: Result) -> Path:
    """The .html, .csv and .md files and the pictures beside a JSON file; gives the page's path."""
    pictures = draw_plots(result)
    write_text(json_file.with_suffix(".csv"), csv_text(result))
    write_text(json_file.with_suffix(".md"), markdown(result))
    _write_pictures(json_file.with_suffix(""), pictures)
    return write_text(json_file.with_suffix(".html"), html_page(result, pictures))


def _write_pictures(folder: Path, pictures: dict[str, bytes]) -> None:
    for name, png in pictures.items():
        write_bytes(folder / f"{name}.png", png)


def _profile(source: NetworkSource, options: Namespace) -> int:
    form, _, engine = options.profile.partition("/")
    (case,) = choose_cases(options.device, [engine], [form])
    able, reason = ENGINES[case.engine].available()
    if not able:
        raise DSPError(f"{case.label} cannot run here: {reason}")
    network = load_network(source)
    x = case_input(network, (options.batch or [1])[0], options.seed, options.device)
    peaks = measure_peaks(options.device, _dtypes([case]))
    parts = profile_engine(case.engine, network.form(form).to(x.device), x, peaks)
    total = sum(part.seconds for part in parts)
    lines = [
        (
            part.name,
            f"{1e6 * part.seconds:.1f}",
            f"{100 * part.seconds / total:.1f}",
            "" if part.floor is None else f"{1e6 * part.floor:.1f}",
            "" if part.floor is None or part.seconds <= 0 else f"{100 * part.floor / part.seconds:.0f}",
        )
        for part in parts
    ]
    columns = ("part", "microseconds", "%", "floor", "% of floor")
    _print(f"{case.label}, {network.label}, batch {len(x)}: {1e6 * total:.0f} microseconds", columns, lines)
    return 0


def _default_networks() -> list[str]:
    """The two real networks with four groups. Raises DSPFormatError where they are not there."""
    if not (shared_folder() / "nets").is_dir():
        raise DSPFormatError(
            f"no real networks at {shared_folder()} (DSP_SHARED names their folder); name one with --net, "
            "for example --net cifar_resnet56 --structure random:g=4,rate=0.65"
        )
    return ["resnet20_g4", "resnet56_g4"]


def _default_target(sources: Sequence[NetworkSource], device: str) -> Path:
    names = "_".join(Path(source.name).stem for source in sources)
    return HERE / "results" / f"{names}_{device.replace(':', '')}.json"


def _dtypes(cases: Iterable[Case]) -> tuple[torch.dtype, ...]:
    usable = [ENGINES[case.engine] for case in cases if ENGINES[case.engine].available()[0]]
    return tuple(dict.fromkeys([torch.float32, *(engine.dtype for engine in usable)]))


def _weights(networks: Sequence[Network], cases: Iterable[Case], options: Namespace) -> list[float]:
    """How long each batch size of each network takes beside the others, guessed from its multiply-adds.

    A part that is the same for all, the timing of the largest as three of those, compiling at one batch size
    as four, and building all else with the first batch size as two.
    """
    batches = sorted(options.batch or _BATCHES)
    slow = any(ENGINES[case.engine].slow_build and ENGINES[case.engine].available()[0] for case in cases)
    macs = [network.macs("dense") for network in networks]
    made = []
    for count in macs:
        size = count / max(macs)
        for place, batch in enumerate(batches):
            compiles = slow and (not options.short or place == len(batches) // 2)
            made.append(1 + size * (3 * batch / batches[-1] + 4 * compiles + 2 * (place == 0)))
    return made


def _print(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console = Console()
    # A file or a pipe has no width: whole lines are worth more there than eighty columns.
    Console(width=None if console.is_terminal else 220).print(table)


@contextmanager
def _progress() -> Iterator[tuple[Progress, Told]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("starting", total=None)
        yield (
            lambda done, total: bars.update(task, completed=done, total=total),
            lambda text: bars.update(task, description=text),
        )


def check_options(options: Namespace) -> None:
    """Raises DSPError for an option of ``run`` that cannot work here."""
    for name in ("rounds", "threads", "image_size", "seconds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise DSPError(f"--{name.replace('_', '-')} is {value}; expected more than 0")
    _check_device(options.device)
    if options.profile and "/" not in options.profile:
        raise DSPError(f"--profile is {options.profile!r}; expected FORM/ENGINE, as packed/fused:cpu")


def _check_device(name: str) -> None:
    device = None
    with suppress(RuntimeError):
        device = torch.device(name)
    # torch keeps eight bits of a number: "cuda:256" would be the first device.
    wrapped = device is not None and ":" in name and str(device) != name
    if device is None or wrapped or (device.type != "cuda" and name != "cpu"):
        raise DSPError(f"--device is {name!r}; expected cpu, cuda or cuda:1")
    if device.type == "cpu":
        return
    able, reason = cuda_available()
    count = torch.cuda.device_count() if able else 0
    if able and (device.index or 0) >= count:
        reason = f"torch finds {count} CUDA device{'s' * (count != 1)}, the last is cuda:{count - 1}"
    if reason:
        raise DSPError(f"--device is {name!r}, but {reason}")
