"""Engines side by side on one network: first each must give the right answer, then it is timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

import torch
from torch import Tensor

from dsp_kernels.errors import DSPBackendError, DSPVerificationError

from .cases import Case, build_case, case_input, default_cases
from .cuda_timing import device_times
from .engines import ENGINES, Runner
from .floors import floors
from .gate import check
from .isolation import IsolatedEngine
from .networks import REFERENCE, Network, NetworkSource
from .peaks import Peaks
from .results import write_json
from .rows import Row
from .timing import LocalTimer, Progress, Timer, TimingRules, measure

__all__ = ["Row", "Told", "choose_cases", "run_cases", "time_runners", "with_floors", "write_json"]

Told = Callable[[str], None]  # told what is being done now


def choose_cases(device: str = "cpu", engines: Sequence[str] = (), forms: Sequence[str] = ()) -> list[Case]:
    """The default plan, or every given form (default: all but "released") in every given engine.

    Raises DSPBackendError for a name that is not known.
    """
    for name, known in [(e, ENGINES) for e in engines] + [(f, REFERENCE) for f in forms]:
        if name not in known:
            raise DSPBackendError(f"unknown engine or form {name!r}; known are {', '.join(known)}")
    if not engines:
        return [case for case in default_cases(device) if not forms or case.form in forms]
    chosen = forms or [form for form in REFERENCE if form != "released"]
    return [Case(form, engine) for form in chosen for engine in engines]


def run_cases(
    network: Network,
    batches: Sequence[int],
    cases: Sequence[Case],
    rules: TimingRules,
    *,
    device: str = "cpu",
    isolate: NetworkSource | None = None,
    short: bool = False,
    progress: Progress | None = None,
    tell: Told | None = None,
) -> list[Row]:
    """One row for each case and batch size; a case that cannot run or is wrong is a row with its reason.

    isolate: where the network comes from; each engine then has a process of its own. short: engines that
    take long to build are built at the middle batch size only. progress: (turns done, of all).
    """
    rows: list[Row] = []
    built_at = sorted(batches)[len(batches) // 2]
    for done, batch in enumerate(batches):
        x = case_input(network, batch, rules.seed, device)
        answers: dict[str, Tensor] = {}
        built: list[Row] = []
        with ExitStack() as stack:
            timers: dict[str, Timer] = {}
            runners: dict[str, Runner] = {}
            for case in cases:
                if tell is not None:
                    tell(f"batch {batch}: building {case.label}")
                if short and ENGINES[case.engine].slow_build and batch != built_at:
                    reason = f"takes long to build: the short plan builds it for batch {built_at} only"
                    built.append(_skipped(case, batch, reason))
                elif isolate is not None:
                    engine = IsolatedEngine(isolate, case, batch, seed=rules.seed, device=device)
                    stack.enter_context(closing(engine))
                    built.append(engine.row)
                    if engine.row.status == "ok":
                        timers[case.label] = engine
                else:
                    row, run = build_case(case, network, x, _answer(answers, network, case, x))
                    built.append(row)
                    if run is not None:
                        runners[case.label] = run
                        timers[case.label] = _timer(run, x)
            if tell is not None:
                tell(f"batch {batch}: timing {len(timers)} engines")
            steps = None if progress is None else _shifted(progress, done, len(batches))
            samples = measure(timers, rules, steps) if timers else {}
        for row in built:
            row = replace(row, samples=samples.get(row.engine))
            if x.is_cuda and row.engine in runners:
                row = _with_device_times(row, runners[row.engine], x)
            rows.append(row)
    return rows


def with_floors(rows: Sequence[Row], network: Network, peaks: Peaks) -> list[Row]:
    """The rows with the floor of the whole network for their form, batch size and precision."""
    made = []
    for row in rows:
        engine = ENGINES.get(row.runner)
        found = None
        if engine is not None and row.samples is not None:
            found = floors(network.program(REFERENCE[row.form]), row.batch, peaks, engine.dtype)
        made.append(replace(row, floor=None if found is None else found.network))
    return made


def time_runners(
    runners: Mapping[str, Runner],
    x: Tensor,
    expected: Tensor,
    allowed: float,
    *,
    unchecked: Sequence[str] = (),
    rules: TimingRules | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """Check callables on ``x``, then time all of them side by side.

    x: (batch, channels, height, width); expected: (batch, classes); allowed: the largest right difference.
    unchecked: runners that are another network, shown for their speed alone.
    Raises DSPVerificationError before anything is timed.
    """
    differences: dict[str, float | None] = {}
    for name, run in runners.items():
        if name in unchecked:
            differences[name] = None
            continue
        checked = check(name, run, x, expected, allowed)
        if checked.error:
            raise DSPVerificationError(checked.error)
        differences[name] = checked.difference
    samples = measure({name: _timer(run, x) for name, run in runners.items()}, rules, progress)
    return [Row(name, len(x), samples[name], differences[name]) for name in runners]


def _timer(run: Runner, x: Tensor) -> LocalTimer:
    return LocalTimer(lambda: run(x), torch.cuda.synchronize if x.is_cuda else None)


def _answer(answers: dict[str, Tensor], network: Network, case: Case, x: Tensor) -> Tensor:
    """What the reference of a case gives, computed once per batch."""
    name = REFERENCE[case.form]
    if name not in answers:
        with torch.inference_mode():
            answers[name] = network.form(name).to(x.device)(x)
    return answers[name]


def _with_device_times(row: Row, run: Runner, x: Tensor) -> Row:
    found = device_times(lambda: run(x))
    return replace(row, enqueue_seconds=found.enqueue, cold_seconds=found.cold)


def _skipped(case: Case, batch: int, reason: str) -> Row:
    return Row(
        case.label, batch, None, None, status="skipped", reason=reason, form=case.form, runner=case.engine
    )


def _shifted(progress: Progress, done: int, parts: int) -> Progress:
    return lambda step, steps: progress(done * steps + step, parts * steps)
