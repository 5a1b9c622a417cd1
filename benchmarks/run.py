"""Engines side by side on one network: first each must give the right answer, then it is timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

import torch
from torch import Tensor

from dsp_kernels.errors import DSPBackendError, DSPVerificationError

from .cases import Case, build_case, case_input, check, default_cases
from .engines import ENGINES, Runner
from .measure.cuda_timing import device_times
from .measure.floors import floors
from .measure.isolation import IsolatedEngine
from .measure.peaks import Peaks
from .measure.samples import FEWEST_ROUNDS
from .measure.timing import LocalTimer, Progress, Timer, TimingRules, measure
from .report.results import Row, write_json
from .subjects.networks import REFERENCE, Network, NetworkSource

__all__ = [
    "Budget",
    "Row",
    "Told",
    "choose_cases",
    "run_cases",
    "time_runners",
    "with_floors",
    "write_json",
]

_BUILDING = 0.6  # of the time for a batch size; after it no build begins

Told = Callable[[str], None]  # told what is being done now


def choose_cases(device: str = "cpu", engines: Sequence[str] = (), forms: Sequence[str] = ()) -> list[Case]:
    """The default plan, or every given form (default: all but "released") in every given engine.

    engines: names, or ``form/engine`` for one form only.

    Raises DSPBackendError for a name that is not known.
    """
    names = [(name.rpartition("/")[2], ENGINES) for name in engines] + [(form, REFERENCE) for form in forms]
    names += [(name.partition("/")[0], REFERENCE) for name in engines if "/" in name]
    for name, known in names:
        if name not in known:
            raise DSPBackendError(f"unknown engine or form {name!r}; known are {', '.join(known)}")
    named = [Case(*name.split("/")) for name in engines if "/" in name]
    engines = [name for name in engines if "/" not in name]
    if not engines and not named:
        return [case for case in default_cases(device) if not forms or case.form in forms]
    chosen = forms or [form for form in REFERENCE if form != "released"]
    return [*named, *(Case(form, engine) for form in chosen for engine in engines)]


def run_cases(
    network: Network,
    batches: Sequence[int],
    cases: Sequence[Case],
    rules: TimingRules,
    *,
    device: str = "cpu",
    isolate: NetworkSource | None = None,
    short: bool = False,
    budget: Budget | None = None,
    progress: Progress | None = None,
    tell: Told | None = None,
) -> list[Row]:
    """One row for each case and batch size; a case that cannot run or is wrong is a row with its reason.

    isolate: where the network comes from; each engine then has a process of its own. short: engines that
    take long to build are built at the middle batch size only. budget: the next of its parts are these batch
    sizes; what does not fit is a row that says so. progress: (turns done, of all).
    """
    rows: list[Row] = []
    kept: dict[str, tuple[Runner, float]] = {}
    middle = sorted(batches)[len(batches) // 2]
    for done, batch in enumerate(batches):
        share = None if budget is None else budget.next_part()
        started = time.perf_counter()
        x = case_input(network, batch, rules.seed, device)
        answers: dict[str, Tensor] = {}
        built: dict[Case, Row] = {}
        with ExitStack() as stack:
            timers: dict[str, Timer] = {}
            runners: dict[str, Runner] = {}
            # Ours first and what takes long to build last: the time may not suffice for all.
            for case in sorted(cases, key=_urgency):
                able = ENGINES[case.engine].available()[0]
                slow = ENGINES[case.engine].slow_build and able
                if tell is not None:
                    tell(f"{network.label}, batch {batch}: building {case.label}")
                if slow and short and batch != middle:
                    built[case] = _skipped(case, batch, f"built for batch {middle} only in the short plan")
                elif share is not None and able and time.perf_counter() - started > _BUILDING * share:
                    reason = f"building the others took the time: {share:.0f} s for this batch size"
                    built[case] = _skipped(case, batch, reason)
                elif isolate is not None:
                    try:
                        engine = IsolatedEngine(isolate, case, batch, seed=rules.seed, device=device)
                    except DSPBackendError as error:  # it died of its build
                        built[case] = _skipped(case, batch, str(error))
                        continue
                    stack.enter_context(closing(engine))
                    built[case] = engine.row
                    if engine.row.status == "ok":
                        timers[case.label] = engine
                else:
                    built[case], run = build_case(
                        case,
                        network,
                        x,
                        _answer(answers, network, case, x),
                        built=kept,
                        count_right=batch == max(batches),
                    )
                    if run is not None:
                        runners[case.label] = run
                        timers[case.label] = _timer(run, x)
            if tell is not None:
                tell(f"{network.label}, batch {batch}: timing {len(timers)} engines")
            if share is not None:
                # A build that ran late must not cost the others their timing: nothing would be measured.
                left = max((1 - _BUILDING) * share, share - (time.perf_counter() - started))
                rules = replace(rules, most_seconds=left)
            steps = None if progress is None else _shifted(progress, done, len(batches))
            samples = measure(timers, rules, steps) if timers else {}
        for case in cases:
            row = replace(built[case], samples=samples.get(case.label))
            if row.status == "ok" and not row.samples:
                row = _skipped(
                    case, batch, f"{FEWEST_ROUNDS} rounds do not fit into the time for this batch size"
                )
            if x.is_cuda and case.label in runners and row.samples:
                row = _with_device_times(row, runners[case.label], x)
            rows.append(row)
    right = {row.engine: row.accuracy for row in rows if row.accuracy is not None}
    return [replace(row, accuracy=right.get(row.engine)) if row.samples else row for row in rows]


def with_floors(rows: Sequence[Row], network: Network, peaks: Peaks) -> list[Row]:
    """The rows with the floor of the whole network for their form, batch size and precision."""
    made = []
    for row in rows:
        engine = ENGINES.get(row.runner)
        found = None
        if engine is not None and row.samples is not None:
            found = floors(network.program(REFERENCE[row.form]), row.batch, peaks, engine.dtype)
        if found is not None:
            row = replace(row, floor=found.network, moved=found.moved)
        made.append(row)
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
        model = network.form(name).to(x.device)
        with torch.inference_mode():
            answers[name] = model(x)
    return answers[name]


def _with_device_times(row: Row, run: Runner, x: Tensor) -> Row:
    found = device_times(lambda: run(x))
    return replace(row, enqueue_seconds=found.enqueue, device_seconds=found.warm, cold_seconds=found.cold)


def _urgency(case: Case) -> int:
    return 2 * ENGINES[case.engine].slow_build - case.engine.startswith("fused")


def _skipped(case: Case, batch: int, reason: str) -> Row:
    return Row(
        case.label, batch, None, None, status="skipped", reason=reason, form=case.form, runner=case.engine
    )


def _shifted(progress: Progress, done: int, parts: int) -> Progress:
    return lambda step, steps: progress(done * steps + step, parts * steps)


class Budget:
    """seconds: for everything, from now on; None: no limit. weights: of the parts in order, positive."""

    def __init__(self, seconds: float | None, weights: Sequence[float]) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.perf_counter() + seconds
        self._weights = list(weights)

    def next_part(self) -> float | None:
        """Seconds for the part that begins now: its weight's share of what is left, 0 where nothing is."""
        weight, left = self._weights[0], sum(self._weights)
        del self._weights[0]
        if self._end is None:
            return None
        return max(0.0, self._end - time.perf_counter()) * weight / left
