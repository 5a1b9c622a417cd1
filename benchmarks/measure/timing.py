"""How one number is taken: engines in turn, in a new random order every round, each settled first."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from .samples import FEWEST_ROUNDS, Samples

__all__ = ["LocalTimer", "Progress", "Samples", "Timer", "TimingRules", "measure", "shared_rounds"]

Progress = Callable[[int, int], None]

# A call this long fills the caches and wakes the threads itself; a warm one before it would only cost time.
_LONG_CALL = 0.05


@dataclass(frozen=True)
class TimingRules:
    """How long everything lasts, in seconds, and how often it is repeated.

    rounds: how often each engine has its turn; 50 find a slowdown of 10 % in 98 of 100 runs here (tests).
    warmup: how long each runs before the first round.
    gap: idle time before a turn, in which the worker threads of the engine before stop spinning. Those of
    ONNX Runtime spin for more than 20 ms: ResNet-50 read 12.8 ms after such a gap, 10.7 after a longer one.
    warm_calls, settle: untimed calls at the beginning of a turn, so many at least and for so long: after the
    gap, a call of 0.3 ms needs about ten to be as fast as in a loop. None where a call is longer than 50 ms.
    burst: how long the timed calls of a turn last, if that takes no more than ``most_calls``.
    shortest: a call shorter than this is repeated within one sample and the mean taken: below it the clock
    and the loop would show. most_seconds: for all engines together, see ``shared_rounds``; an engine that
    cannot have eight rounds in it is left out.
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
    most_seconds: float | None = None

    @classmethod
    def throughput(cls, rounds: int = 10, window: float = 0.25, seed: int = 0) -> TimingRules:
        """Calls back to back for ``window`` seconds are one sample: how much is done, not how soon."""
        return cls(rounds=rounds, burst=0.0, most_calls=1, shortest=window, seed=seed)

    def with_rounds(self, rounds: int) -> TimingRules:
        """The same with another number of rounds."""
        return replace(self, rounds=rounds)


class Timer(Protocol):
    """Something that can time one engine, here or in another process."""

    def warm_up(self, seconds: float) -> float:
        """Run for a while, twice at least, once if that is long; the seconds of the fastest call."""
        ...

    def burst(self, warm_calls: int, calls: int, repeats: int) -> list[float]:
        """Seconds of each of ``calls`` samples of ``repeats`` calls, after some untimed ones."""
        ...


@dataclass(frozen=True)
class LocalTimer:
    """Times a callable in this process. synchronize waits for the device before the clock stops."""

    call: Callable[[], object]
    synchronize: Callable[[], None] | None = None

    def warm_up(self, seconds: float) -> float:
        taken: list[float] = []
        end = time.perf_counter() + seconds
        while len(taken) < 2 or time.perf_counter() < end:
            taken.append(self._sample(1))
            if taken[0] > max(seconds, _LONG_CALL):
                break
        return min(taken)

    def burst(self, warm_calls: int, calls: int, repeats: int) -> list[float]:
        for _ in range(warm_calls):
            self._sample(1)
        return [self._sample(repeats) for _ in range(calls)]

    def _sample(self, repeats: int) -> float:
        call = self.call
        started = time.perf_counter()
        for _ in range(repeats):
            call()
        if self.synchronize is not None:
            self.synchronize()
        return (time.perf_counter() - started) / repeats


def measure(
    timers: Mapping[str, Timer], rules: TimingRules | None = None, progress: Progress | None = None
) -> dict[str, Samples]:
    """Seconds per call of every entry of ``timers``, taken side by side.

    Each round gives every engine one turn, in an order drawn from the seed, so that a machine that slows
    down slows all of them down. A turn: idle gap, warm calls, timed calls. Where the time is limited, slow
    engines sit out some rounds, evenly over the whole run; entries that did not fit are not in the result.
    """
    rules = rules or TimingRules()
    started = time.perf_counter()
    calls, repeats, warm, turn = {}, {}, {}, {}
    for name, timer in timers.items():
        once = max(timer.warm_up(rules.warmup), 1e-9)
        repeats[name] = max(1, round(rules.shortest / once))
        calls[name] = min(rules.most_calls, max(1, round(rules.burst / (once * repeats[name]))))
        warm[name] = max(rules.warm_calls, round(rules.settle / once)) if once < _LONG_CALL else 0
        turn[name] = rules.gap + once * (warm[name] + repeats[name] * calls[name])
    most = math.inf if rules.most_seconds is None else rules.most_seconds
    left = most - (time.perf_counter() - started)
    rounds = shared_rounds(turn, rules.rounds, left)
    order = list(rounds)
    shuffle = random.Random(rules.seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for done in range(rules.rounds):
        shuffle(order)
        spent = time.perf_counter() - started
        if spent > 2 * most:
            break
        for name in order:
            taken = len(seconds[name]) // calls[name]
            # Of R rounds it takes part in r, every (R / r)-th; a machine that slowed down ends it at eight.
            if (done + 1) * rounds[name] // rules.rounds <= taken or (
                spent > most and taken >= FEWEST_ROUNDS
            ):
                continue
            time.sleep(rules.gap)
            seconds[name] += timers[name].burst(warm[name], calls[name], repeats[name])
        if progress is not None:
            progress(done + 1, rules.rounds)
    return {name: Samples(tuple(values), calls[name]) for name, values in seconds.items()}


def shared_rounds(turn: Mapping[str, float], rounds: int, seconds: float) -> dict[str, int]:
    """How many rounds each engine takes part in, so that all of them fit into ``seconds`` together.

    turn: seconds of one turn of each. Every engine may use the same time, and at least what eight rounds
    need; where even that is too much, the slowest are left out, so the result may lack them.
    """
    if seconds == math.inf:
        return dict.fromkeys(turn, rounds)
    fewest = min(rounds, FEWEST_ROUNDS)
    kept = sorted(turn, key=turn.__getitem__)
    while kept and fewest * sum(turn[name] for name in kept) > seconds:
        kept.pop()

    def given(allowance: float) -> dict[str, int]:
        return {name: min(rounds, max(fewest, int(allowance / turn[name] + 1e-6))) for name in kept}

    low, high = 0.0, seconds
    for _ in range(30):
        middle = (low + high) / 2
        fits = sum(count * turn[name] for name, count in given(middle).items()) <= seconds
        low, high = (middle, high) if fits else (low, middle)
    found = given(low)
    return {name: found[name] for name in turn if name in found}
