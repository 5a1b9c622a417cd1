"""How samples are taken: engines take turns in random order, and each is warm before it is timed."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from .samples import FEWEST_ROUNDS, Samples

# A call this long fills the caches and wakes the threads itself; a warm-up call would only cost time.
_LONG_CALL = 0.05
_PROBE_SIZE, _PROBE_REPEATS = 256, 3


@dataclass(frozen=True)
class TimingRules:
    """How long everything takes, in seconds, and how often it is repeated.

    rounds: turns of each engine; 50 find a slowdown of 10 % in 98 of 100 runs here (tests).
    warmup: how long each engine runs before the first round.
    gap: idle time before a turn, in which the previous engine's worker threads stop spinning. Those of ONNX
    Runtime spin for more than 20 ms: ResNet-50 took 12.8 ms after such a gap, 10.7 ms after a longer one.
    warm_calls, settle: untimed calls at the start of a turn, at least so many and for so long: after the gap
    a call of 0.3 ms needs about ten to be as fast as in a loop. None if a call takes more than 50 ms.
    burst: how long the timed calls of a turn last, at most ``most_calls`` of them.
    shortest: calls that take less are repeated within one sample, as the clock and the loop would show.
    most_seconds: for all engines together, see ``measure``.
    """

    rounds: int = 50
    warmup: float = 0.3
    gap: float = 0.05
    warm_calls: int = 2
    settle: float = 0.01
    burst: float = 0.02
    most_calls: int = 10
    shortest: float = 2e-4
    seed: int = 0
    most_seconds: float = math.inf

    @classmethod
    def throughput(cls, rounds: int = 10, window: float = 0.25, seed: int = 0) -> TimingRules:
        """One sample is ``window`` seconds of back-to-back calls."""
        return cls(rounds=rounds, burst=0.0, most_calls=1, shortest=window, seed=seed)


@dataclass(frozen=True)
class Timer:
    """Times a callable in this process. synchronize: waits for the device before the clock stops."""

    call: Callable[[], object]
    synchronize: Callable[[], None] | None = None

    def warm_up(self, seconds: float) -> float:
        """Run for a while, at least twice, once if a call is long; the seconds of the fastest call."""
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while len(taken) < 2 or time.perf_counter() < end:
            taken.append(self._sample(1))
            if taken[0] > max(seconds, _LONG_CALL):
                break
        return min(taken)

    def burst(self, warm_calls: int, calls: int, repeats: int) -> list[float]:
        """Seconds per call of ``calls`` samples of ``repeats`` calls, after some untimed ones."""
        for _ in range(warm_calls):
            self._sample(1)
        return [self._sample(repeats) for _ in range(calls)]

    def _sample(self, repeats: int) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            self.call()
        if self.synchronize is not None:
            self.synchronize()
        return (time.perf_counter() - started) / repeats


class Probe:
    """Times a fixed product of matrices: a neighbour on the same core, matrix unit or memory makes it slower.

    The product is in bfloat16 if that is faster here: then it runs where 16-bit engines do.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.best = math.inf  # seconds of the fastest in this process
        wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else None
        timers = []
        for dtype in (torch.float32, torch.bfloat16):
            one = torch.ones(_PROBE_SIZE, _PROBE_SIZE, dtype=dtype, device=device)
            timers.append(Timer(partial(torch.mm, one, one, out=torch.empty_like(one)), wait))
        self.timer = min(timers, key=lambda timer: timer.warm_up(0.0))

    def __call__(self) -> float:
        """Mean seconds of a product among several: an interruption counts by how long it is."""
        (seconds,) = self.timer.burst(1, 1, _PROBE_REPEATS)
        self.best = min(self.best, seconds)
        return seconds


@dataclass(frozen=True)
class _Turn:
    """What an engine does in one round, and how long that takes."""

    warm_calls: int
    calls: int
    repeats: int
    seconds: float

    @classmethod
    def of(cls, once: float, rules: TimingRules) -> _Turn:
        """once: seconds of one call."""
        once = max(once, 1e-9)
        repeats = max(1, round(rules.shortest / once))
        calls = min(rules.most_calls, max(1, round(rules.burst / (once * repeats))))
        warm = max(rules.warm_calls, round(rules.settle / once)) if once < _LONG_CALL else 0
        return cls(warm, calls, repeats, rules.gap + once * (warm + repeats * calls))


def measure(
    timers: Mapping[str, Timer],
    rules: TimingRules | None = None,
    *,
    always: Collection[str] = (),
    probe: Probe | None = None,
    step: Callable[[], object] = lambda: None,
) -> dict[str, Samples]:
    """Seconds per call of each engine, taken side by side.

    Each round gives every engine one turn (idle gap, warm-up calls, timed calls), in an order drawn from the
    seed, so that a machine that slows down slows down all of them.

    If the time is limited, slow engines skip rounds, evenly over the run, but take part in eight at least.
    ``timers`` holds the most important engines first: one whose eight rounds do not fit beside those of the
    engines before it is left out. always: engines that get eight rounds in any case.
    probe: runs after each gap, for ``Samples.busy``: not right after an engine, whose threads still spin.
    step: called after each round.
    """
    rules = rules or TimingRules()
    fewest = min(rules.rounds, FEWEST_ROUNDS)
    started = time.perf_counter()

    def left(share: float = 1.0) -> float:
        return share * rules.most_seconds - (time.perf_counter() - started)

    turns: dict[str, _Turn] = {}
    needed = 0.0  # seconds of the fewest rounds of the engines in ``turns``
    for name, timer in timers.items():
        if name not in always and needed > left():
            continue
        turn = _Turn.of(timer.warm_up(rules.warmup), rules)
        if name in always or needed + fewest * turn.seconds <= left():
            turns[name] = turn
            needed += fewest * turn.seconds
    rounds = shared_rounds({name: turn.seconds for name, turn in turns.items()}, rules.rounds, left())
    order = list(turns)
    shuffle = random.Random(rules.seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in order}
    probed: dict[str, list[float]] = defaultdict(list)
    previous = ""
    for done in range(1, rules.rounds + 1):
        shuffle(order)
        for name in order:
            turn = turns[name]
            taken = len(seconds[name]) // turn.calls
            # If the machine has slowed down: no more than eight rounds, and none after twice the time.
            late = (taken >= fewest and left() < 0) or (name not in always and left(2) < 0)
            if late or done * rounds[name] // rules.rounds <= taken:
                continue
            time.sleep(rules.gap)
            if probe:
                probed[name].append(probe())
                probed[previous].append(probed[name][-1])  # after that engine's turn
                previous = name
            seconds[name] += timers[name].burst(turn.warm_calls, turn.calls, turn.repeats)
        step()
    busy = {name: statistics.fmean(times) / (probe.best or 1) for name, times in probed.items() if probe}
    return {
        name: Samples(tuple(values), turns[name].calls, busy.get(name))
        for name, values in seconds.items()
        if values
    }


def shared_rounds(turn: Mapping[str, float], rounds: int, seconds: float) -> dict[str, int]:
    """Rounds of each engine, at least eight, so that all fit into ``seconds`` if possible.

    turn: seconds of one turn of each. Every engine may use the same time; what a quick one leaves is shared.
    """
    shared = {}
    for place, (name, once) in enumerate(sorted(turn.items(), key=lambda item: item[1])):
        fitting = max(0.0, seconds) / (len(turn) - place) / once + 1e-6
        shared[name] = int(min(rounds, max(FEWEST_ROUNDS, fitting)))
        seconds -= shared[name] * once
    return shared
