"""Engines side by side on one network: each must first give the right answer, then it is timed."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor

from .cases import Case, build_case
from .engines import ENGINES, Runner
from .measure.cuda_timing import device_times
from .measure.floors import compulsory_bytes, part_floor
from .measure.peaks import Peaks
from .measure.samples import FEWEST_ROUNDS
from .measure.timing import Probe, Timer, TimingRules, measure
from .report.results import Row
from .subjects.networks import Network

_probe = cache(Probe)  # one in a process, so that its best is of a quiet moment
_BUILDING = 0.6  # share of the time for a batch size after which only key engines are still built


def run_cases(
    network: Network,
    batches: Sequence[int],
    cases: Sequence[Case],
    rules: TimingRules,
    *,
    device: str = "cpu",
    short: bool = False,
    budget: Iterator[float] | None = None,
    step: Callable[[str], object] = lambda text: None,
) -> list[Row]:
    """One row for each case and batch size; a case that cannot run or is wrong is a row with the reason.

    short: engines that are slow to build are built for the middle batch size only. budget: seconds
    for each batch size. What does not fit is a row that says so; only key cases (``Case.is_key``) are timed
    in any case. step: receives what is being done, once for each case and round of a batch size.
    """
    rows: list[Row] = []
    kept: dict[str, tuple[Runner, float]] = {}
    slow_batch = sorted(batches)[len(batches) // 2] if short else None
    for batch in batches:
        share = math.inf if budget is None else next(budget)
        started = time.perf_counter()
        x = network.images(batch, rules.seed).to(device)
        answers: dict[str, Tensor] = {}
        built: dict[Case, Row] = {}
        runners: dict[str, Runner] = {}
        slowest = 0.0  # seconds of the slowest build
        for case in sorted(cases, key=lambda case: case.priority):
            step(f"{network.label}, batch {batch}: building {case.label}")
            began = time.perf_counter()
            slow = ENGINES[case.engine].slow_build
            late = began - started + slowest * slow > _BUILDING * share  # one like the slowest would not fit
            reason = ""
            if slow and slow_batch not in (None, batch):
                reason = f"built for batch {slow_batch} only in the short plan"
            elif late and (slow or not case.is_key):
                reason = f"building the others took the time: {share:.0f} s for this batch size"
            if reason:
                built[case] = case.row(batch, "skipped", reason)
                continue
            counted = (slow and slow_batch) or max(batches)
            built[case], run = build_case(
                case, network, x, answers=answers, built=kept, count_right=batch == counted
            )
            if run is not None:
                runners[case.label] = run
            slowest = max(slowest, time.perf_counter() - began)
        wait = torch.cuda.synchronize if x.is_cuda else None
        timers = {label: Timer(partial(run, x), wait) for label, run in runners.items()}
        # A build that overran must not cost the others their timing.
        left = max((1 - _BUILDING) * share, share - (time.perf_counter() - started))
        timing = f"{network.label}, batch {batch}: timing {len(timers)} engines"
        samples = measure(
            timers,
            replace(rules, most_seconds=left),
            always=[case.label for case in cases if case.is_key],
            probe=_probe(device),
            step=partial(step, timing),
        )
        for case in cases:
            row = replace(built[case], samples=samples.get(case.label))
            if row.status == "ok" and row.samples is None:
                reason = f"{FEWEST_ROUNDS} rounds do not fit into the time for this batch size"
                row = case.row(batch, "skipped", reason)
            elif x.is_cuda and row.samples is not None:
                warm, cold, enqueue = device_times(partial(runners[case.label], x))
                row = replace(row, device_seconds=warm, cold_seconds=cold, enqueue_seconds=enqueue)
            rows.append(row)
    right = {row.engine: row.accuracy for row in rows if row.accuracy is not None}
    return [replace(row, accuracy=right.get(row.engine)) if row.samples else row for row in rows]


def with_floors(rows: Sequence[Row], network: Network, peaks: Peaks) -> list[Row]:
    """The rows with the floor of the whole network for their form, batch size and precision."""
    made = []
    for row in rows:
        engine = ENGINES.get(row.runner)
        if engine is not None and row.samples and not engine.tf32 and peaks.knows(engine.dtype):
            program = network.program(row.form)
            floor = part_floor(program, program.steps, row.batch, peaks, engine.dtype)
            moved = compulsory_bytes(program, program.steps, row.batch, engine.dtype)
            row = replace(row, floor=floor, moved=moved)
        made.append(row)
    return made


def time_shares(seconds: float | None, weights: Sequence[float]) -> Iterator[float]:
    """Yield the seconds for each part when it begins: its weight's share of what is left, 0 if nothing is.

    seconds: for all parts; None: no limit. weights: of the parts in order, positive.
    """
    end = math.inf if seconds is None else time.perf_counter() + seconds
    for place, weight in enumerate(weights):
        yield max(0.0, end - time.perf_counter()) * weight / sum(weights[place:])
