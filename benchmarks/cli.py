"""``python -m dsp_benchmarks run | compare | report``: the parser and the commands."""

import argparse
import itertools
import re
import sys
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dsp_kernels.errors import DSPError
from dsp_kernels.whole_file import write_text
from dsp_pruning.recipes.run import pick_device

from .cases import Case, choose_cases
from .engines import ENGINES
from .engines.base import tf32_products
from .measure.environment import environment
from .measure.peaks import measure_peaks
from .measure.profiles import profile_engine
from .measure.timing import TimingRules
from .report import compare as comparing
from .report.page import html_page
from .report.plots import draw_plots
from .report.results import Result, Run, read_result, write_result
from .report.tables import COLUMNS, cells, machine, markdown, put_into_readme
from .run import run_cases, time_shares, with_floors
from .subjects.networks import FORMS, GENERATED, Network, NetworkSource, load_network

_HERE = Path(__file__).resolve().parent
README = _HERE.parent / "README.md"
_DEFAULT_RESULT = _HERE / "results" / "default_cpu.json"  # of `make bench`
README_RESULT = _HERE / "results" / "real_cpu.json"  # of `make bench-readme`: fewer engines, more samples
_BATCHES = (1, 8, 32, 128)
_SHORT_SECONDS = 270.0  # of `make bench`'s five minutes; starting Python and writing the page take the rest
_SHORT_WARMUP = 0.1  # seconds of each engine with --short
_RESERVE = 15.0  # of the time, for measuring the peaks again and for the page
_INTERRUPTED = 130
_NOT_TRIED = ("unavailable", "skipped")  # below the table, by reason


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. An error of ours is one line and status 2.

    ``run`` returns 1 if an engine was wrong or broke, ``compare`` 1 if something became slower.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.function(options)
    except (DSPError, OSError, ImportError) as error:  # also a missing file, and a missing package
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsp_benchmarks")
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("run", help="time networks in many engines")
    one.set_defaults(function=run)
    add = one.add_argument
    nets = "such as resnet56_g4, resnet50_g2_80, cifar_resnet56, resnet18 or a file; repeat it, or use commas"
    add("--net", "--networks", action="extend", type=_names, help=nets)
    add("--structure", help="of an unpruned network: random:g=2,rate=0.7 or an .npz file")
    add("--image-size", type=int, help="default: 32 for CIFAR networks, else 224")
    add("--batch", "--batches", type=_counts, action="extend", help="default: 1,8,32,128")
    engines = f"of {', '.join(ENGINES)}, or form/engine; default: all that are worth comparing"
    add("--engine", "--engines", type=_names, action="extend", help=engines)
    add("--form", "--forms", type=_names, action="extend", help=f"of {', '.join(FORMS)}")
    mode = "time of one call, or calls per time when they follow back to back"
    add("--mode", choices=("latency", "throughput", "both"), default="latency", help=mode)
    add("--rounds", type=int, default=50, help="turns of each engine")
    add("--seed", type=int, default=0, help="of images, weights, random structures and the order of engines")
    add("--device", default="cpu", help="cpu, cuda or cuda:1")
    short = "take 270 seconds: torch.compile for one batch size only, fewer rounds of slow engines"
    add("--short", action="store_true", help=short)
    seconds = "for everything; an engine that does not fit is shown as skipped"
    add("--seconds", type=float, help=seconds)
    profile = "show the time per layer of one engine at the first batch size instead"
    add("--profile", metavar="FORM/ENGINE", help=profile)
    add("--out", type=Path, help="result file; default: benchmarks/results/<net>_<device>.json")
    add("--report", action="store_true", help="write an .html page and .md tables beside the result file")

    two = commands.add_parser("compare", help="has the second result become slower than the first?")
    two.set_defaults(function=compare)
    two.add_argument("first", type=Path)
    two.add_argument("second", type=Path)
    two.add_argument("--other-machine", action="store_true", help="compare even if the machines differ")

    three = commands.add_parser("report", help="write an .html page and .md tables beside a result file")
    three.set_defaults(function=report)
    three.add_argument("result", type=Path, nargs="?", help="default: the committed one")
    table = "write the table of the README between its markers instead"
    three.add_argument("--readme", type=Path, nargs="?", const=README, help=table)
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _counts(text: str) -> list[int]:
    names = _names(text)
    if not names or not all(name.isdecimal() and int(name) > 0 for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}; expected whole numbers above 0, with commas between")
    return [int(name) for name in names]


@tf32_products(False)  # float32 means float32 in every row that does not say tf32
def run(options: Namespace) -> int:
    """Time networks; the exit status is 1 if an engine was wrong or broke."""
    started = time.perf_counter()
    _check_options(options)
    names = options.net or ["resnet20_g4", "resnet56_g4"]
    sources = [NetworkSource(name, options.structure, options.image_size, options.seed) for name in names]
    if options.profile:
        return _profile(sources[0], options)
    cases = choose_cases(options.device, options.engine or (), options.form or ())
    modes = ("latency", "throughput") if options.mode == "both" else (options.mode,)
    parts = [(source, load_network(source), mode) for source in sources for mode in modes]
    before = measure_peaks(options.device, _dtypes(cases, options.device))
    seconds = options.seconds or (_SHORT_SECONDS if options.short else None)
    if seconds is not None:
        seconds = max(0.0, seconds - _RESERVE - (time.perf_counter() - started))
    budget = time_shares(seconds, _weights([network for _, network, _ in parts], cases, options))
    measured = _run_parts(parts, cases, options, budget)
    # Measured again at the end: a busy machine would make floors that engines beat.
    peaks = before.best(measure_peaks(options.device, _dtypes(cases, options.device)))
    runs = [
        replace(one, rows=tuple(with_floors(one.rows, network, peaks)))
        for one, (_, network, _) in zip(measured, parts, strict=True)
    ]
    result = Result(environment(options.device), asdict(peaks), tuple(runs))
    for one in runs:
        tried = replace(one, rows=tuple(row for row in one.rows if row.status not in _NOT_TRIED))
        _print(f"{one.label}, {one.mode}, {torch.get_num_threads()} threads", COLUMNS, cells(tried))
        others: dict[str, dict[str, None]] = {}  # engines by reason, each once
        for row in one.rows:
            if row.status in _NOT_TRIED:
                name = row.engine + f" batch {row.batch}" * (row.status == "skipped")
                others.setdefault(f"{row.status}, {row.reason}", {})[name] = None
        for reason, engines in others.items():
            print(f"{reason}: {', '.join(engines)}")
        for base in filter(None, map(one.baseline, one.batches)):
            if base.form != "dense":
                print(f"batch {base.batch}: no dense engine was timed; times faster is against {base.engine}")
    print(machine(result))
    target = options.out or _default_target(names, options.device)
    print(f"result: {write_result(target, result)}")
    if options.report:
        print(f"page: {_write_report(target, result)}")
    broken = [row for one in runs for row in one.rows if row.status in ("wrong", "failed")]
    for row in broken:
        print(f"error: {row.engine}, batch {row.batch}: {row.reason}", file=sys.stderr)
    return 1 if broken else 0


def _run_parts(
    parts: Sequence[tuple[NetworkSource, Network, str]],
    cases: list[Case],
    options: Namespace,
    budget: Iterator[float],
) -> list[Run]:
    """Measure each network in its mode, with a progress bar on a terminal."""
    from tqdm import tqdm

    batches = sorted(options.batch or _BATCHES)
    warmup = _SHORT_WARMUP if options.short else TimingRules.warmup
    rules = {
        "latency": TimingRules(rounds=options.rounds, seed=options.seed),
        "throughput": TimingRules.throughput(rounds=min(options.rounds, 10), seed=options.seed),
    }
    steps = sum(len(batches) * (len(cases) + rules[mode].rounds) for _, _, mode in parts)
    runs = []
    with tqdm(total=steps, disable=None, leave=False) as bar:  # None: on a terminal only

        def step(text: str) -> None:
            bar.set_description(text, refresh=False)
            bar.update()

        for source, network, mode in parts:
            rows = run_cases(
                network,
                batches,
                cases,
                replace(rules[mode], warmup=warmup),
                device=options.device,
                short=options.short,
                budget=budget,
                step=step,
            )
            ratio = network.macs("dense") / network.macs("packed")
            name = Path(source.name).stem + GENERATED * (GENERATED in network.label)
            runs.append(Run(name, network.label, mode, ratio, tuple(rows)))
    return runs


def compare(options: Namespace) -> int:
    """Compare two results; the exit status is 1 if something became slower."""
    first, second = read_result(options.first), read_result(options.second)
    found = comparing.compare_results(first, second, other_machine=options.other_machine)
    _print(f"{options.second} against {options.first}", comparing.COLUMNS, [one.cells for one in found])
    slower = sum(one.verdict == "slower" for one in found)
    undecided = sum(one.verdict.startswith("no verdict") for one in found)
    print(f"{slower} slower, {undecided} without verdict, of {len(found)}")
    return 1 if slower else 0


def report(options: Namespace) -> int:
    """Write the page and tables beside a result file, or the table of the README."""
    source = options.result or (README_RESULT if options.readme else _DEFAULT_RESULT)
    result = read_result(source)
    if options.readme:
        text = options.readme.read_text(encoding="utf-8")
        write_text(options.readme, put_into_readme(text, result))
    else:
        print(f"page: {_write_report(source, result)}")
    return 0


def _write_report(json_file: Path, result: Result) -> Path:
    """The .html and .md files beside a result file; returns the page's path."""
    write_text(json_file.with_suffix(".md"), markdown(result))
    return write_text(json_file.with_suffix(".html"), html_page(result, draw_plots(result)))


def _profile(source: NetworkSource, options: Namespace) -> int:
    (case,) = choose_cases(options.device, [options.profile])
    network = load_network(source)
    x = network.images((options.batch or [1])[0], options.seed).to(options.device)
    peaks = measure_peaks(options.device, _dtypes([case], options.device))
    parts = profile_engine(case.engine, network.form_on(case.form, x.device), x, peaks)
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


def _default_target(names: Sequence[str], device: str) -> Path:
    stems = "_".join(Path(name).stem for name in names)
    return _HERE / "results" / f"{stems}_{device.replace(':', '')}.json"


def _dtypes(cases: Iterable[Case], device: str) -> tuple[torch.dtype, ...]:
    engines = [ENGINES[case.engine] for case in cases]
    usable = [engine.dtype for engine in engines if engine.device in ("any", device.partition(":")[0])]
    # torch has no matrix product that reaches the peak of int8.
    return tuple(dict.fromkeys([torch.float32, *(dtype for dtype in usable if dtype != torch.int8)]))


def _weights(networks: Sequence[Network], cases: Iterable[Case], options: Namespace) -> list[float]:
    """Expected time of each batch size of each network, relative to the others, from its multiply-adds.

    A constant, plus three times that for timing the largest batch of the largest network, four times for slow
    builds at one batch size, and twice for all other builds, at the first batch size.
    """
    batches = sorted(options.batch or _BATCHES)
    slow = any(ENGINES[case.engine].slow_build for case in cases)
    macs = [network.macs("dense") for network in networks]
    weights = []
    for size, (number, batch) in itertools.product(macs, enumerate(batches)):
        compiles = slow and (not options.short or number == len(batches) // 2)
        work = 3 * batch / batches[-1] + 4 * compiles + 2 * (number == 0)
        weights.append(1 + work * size / max(macs))
    return weights


def _print(title: str, columns: Sequence[str], lines: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console = Console()
    # A file or a pipe has no width: do not fold lines at eighty columns there.
    Console(width=None if console.is_terminal else 220).print(table)


def _check_options(options: Namespace) -> None:
    """Raises DSPError for an option of ``run`` that cannot work here."""
    for name in ("rounds", "image_size", "seconds"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise DSPError(f"--{name.replace('_', '-')} is {value}; expected more than 0")
    # torch keeps eight bits of the index: "cuda:256" would be the first device.
    if not re.fullmatch(r"cpu|cuda(:\d{1,2})?", options.device):
        raise DSPError(f"--device is {options.device!r}; expected cpu, cuda or cuda:1")
    pick_device(options.device)
    if options.profile and "/" not in options.profile:
        raise DSPError(f"--profile is {options.profile!r}; expected FORM/ENGINE, as packed/fused:cpu")
