"""Engines side by side on one network: each must first give the right answer, then it is timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor

from dsp_kernels.errors import DSPBackendError, DSPVerificationError

from .cases import Case, build_case, case_input, check
from .engines import ENGINES, Runner
from .measure.cuda_timing import device_times
from .measure.floors import compulsory_bytes, part_floor
from .measure.isolation import IsolatedEngine
from .measure.peaks import Peaks
from .measure.samples import FEWEST_ROUNDS
from .measure.timing import LocalTimer, Timer, TimingRules, measure
from .report.results import Row
from .subjects.networks import Network, NetworkSource

_BUILDING = 0.6  # share of the time for a batch size after which only key engines are still built

Told = Callable[[str], None]  # receives what is being done now


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
    tell: Told | None = None,
) -> list[Row]:
    """One row for each case and batch size; a case that cannot run or is wrong is a row with the reason.

    isolate: where the network comes from; each engine then has a process of its own. short: engines that are
    slow to build are built for the middle batch size only. budget: its next parts are these batch sizes. What
    does not fit into a part is a row that says so; only key cases (``Case.is_key``) are timed in any case.
    """
    rows: list[Row] = []
    kept: dict[str, tuple[Runner, float]] = {}
    slow_batch = sorted(batches)[len(batches) // 2] if short else None
    for batch in batches:
        share = math.inf if budget is None else budget.next_part()
        started = time.perf_counter()
        x = case_input(network, batch, rules.seed, device)
        answers: dict[str, Tensor] = {}
        built: dict[Case, Row] = {}
        timers: dict[str, Timer] = {}
        runners: dict[str, Runner] = {}
        slowest = 0.0  # seconds of the slowest build
        with ExitStack() as stack:
            if tell is not None:
                tell(f"{network.label}, batch {batch}: building {len(cases)} engines")
            for case in sorted(cases, key=lambda case: case.priority):
                began = time.perf_counter()
                if reason := _why_skipped(case, batch, slow_batch, share, began - started, slowest):
                    built[case] = _skipped(case, batch, reason)
                elif isolate is not None:
                    try:
                        engine = IsolatedEngine(isolate, case, batch, seed=rules.seed, device=device)
                    except DSPBackendError as error:  # it died while building
                        built[case] = _skipped(case, batch, str(error))
                        continue
                    stack.callback(engine.close)
                    built[case] = engine.row
                    if engine.row.status == "ok":
                        timers[case.label] = engine
                else:
                    count_right = batch == max(batches)
                    built[case], run = build_case(
                        case, network, x, answers=answers, built=kept, count_right=count_right
                    )
                    if run is not None:
                        runners[case.label] = run
                        timers[case.label] = _timer(run, x)
                slowest = max(slowest, time.perf_counter() - began)
            if tell is not None:
                tell(f"{network.label}, batch {batch}: timing {len(timers)} engines")
            # A build that overran must not cost the others their timing.
            left = max((1 - _BUILDING) * share, share - (time.perf_counter() - started))
            always = [case.label for case in cases if case.is_key]
            samples = measure(timers, replace(rules, most_seconds=left), always=always)
        for case in cases:
            row = replace(built[case], samples=samples.get(case.label))
            if row.status == "ok" and row.samples is None:
                reason = f"{FEWEST_ROUNDS} rounds do not fit into the time for this batch size"
                row = _skipped(case, batch, reason)
            elif x.is_cuda and case.label in runners and row.samples is not None:
                row = _with_device_times(row, runners[case.label], x)
            rows.append(row)
    right = {row.engine: row.accuracy for row in rows if row.accuracy is not None}
    return [replace(row, accuracy=right.get(row.engine)) if row.samples else row for row in rows]


def _why_skipped(
    case: Case, batch: int, slow_batch: int | None, share: float, spent: float, slowest: float
) -> str:
    """Why a case is not built, or "".

    slow_batch: the only batch size for slow builds, None: all. share, spent, slowest: seconds for this batch
    size, since it began, and of its slowest build so far.
    """
    engine = ENGINES[case.engine]
    if not engine.available()[0]:
        return ""  # its row will say more
    if engine.slow_build and slow_batch not in (None, batch):
        return f"built for batch {slow_batch} only in the short plan"
    late = spent + slowest * engine.slow_build > _BUILDING * share
    if late and (engine.slow_build or not case.is_key):
        return f"building the others took the time: {share:.0f} s for this batch size"
    return ""


def with_floors(rows: Sequence[Row], network: Network, peaks: Peaks) -> list[Row]:
    """The rows with the floor of the whole network for their form, batch size and precision."""
    made = []
    for row in rows:
        engine = ENGINES.get(row.runner)
        if engine is not None and row.samples is not None and peaks.knows(engine.dtype):
            program = network.program(row.form)
            floor = part_floor(program, program.steps, row.batch, peaks, engine.dtype)
            moved = compulsory_bytes(program, program.steps, row.batch, engine.dtype)
            row = replace(row, floor=floor, moved=moved)
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
) -> list[Row]:
    """Check callables on ``x``, then time all of them side by side.

    x: (batch, channels, height, width); expected: (batch, classes); allowed: the largest difference from it.
    unchecked: callables that are another network, shown for their speed alone.
    Raises DSPVerificationError before anything is timed.
    """
    differences: dict[str, float | None] = dict.fromkeys(runners)
    for name, run in runners.items():
        if name not in unchecked:
            differences[name], wrong = check(name, run, x, expected, allowed)
            if wrong:
                raise DSPVerificationError(wrong)
    samples = measure({name: _timer(run, x) for name, run in runners.items()}, rules)
    return [Row(name, len(x), samples[name], differences[name]) for name in runners]


def _timer(run: Runner, x: Tensor) -> LocalTimer:
    return LocalTimer(lambda: run(x), torch.cuda.synchronize if x.is_cuda else None)


def _with_device_times(row: Row, run: Runner, x: Tensor) -> Row:
    found = device_times(lambda: run(x))
    return replace(row, enqueue_seconds=found.enqueue, device_seconds=found.warm, cold_seconds=found.cold)


def _skipped(case: Case, batch: int, reason: str) -> Row:
    row = Row(case.label, batch, None, None, form=case.form, runner=case.engine)
    return replace(row, status="skipped", reason=reason)


class Budget:
    """Shares a time among parts.

    seconds: for all parts, from now on; None: no limit. weights: of the parts in order, positive.
    """

    def __init__(self, seconds: float | None, weights: Sequence[float]) -> None:
        self._end = math.inf if seconds is None else time.perf_counter() + seconds
        self._weights = list(weights)

    def next_part(self) -> float:
        """Seconds for the part that begins now: its weight's share of what is left, 0 if nothing is."""
        share = self._weights[0] / sum(self._weights)
        del self._weights[0]
        return max(0.0, self._end - time.perf_counter()) * share
