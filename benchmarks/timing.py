"""How one number is taken: engines in turn, in a new random order every round, after a warm-up."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

__all__ = ["Samples", "measure"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Samples:
    """Seconds of single calls, in the order in which they were taken."""

    seconds: tuple[float, ...]

    @property
    def n(self) -> int:
        """How many samples there are."""
        return len(self.seconds)

    @property
    def median(self) -> float:
        """The middle of the samples, in seconds."""
        return statistics.median(self.seconds)

    @property
    def p10(self) -> float:
        """A tenth of the samples is not above it."""
        return self._quantile(0.1)

    @property
    def p90(self) -> float:
        """Nine tenths of the samples are not above it."""
        return self._quantile(0.9)

    def _quantile(self, share: float) -> float:
        ordered = sorted(self.seconds)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def measure(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    warmup_seconds: float = 0.3,
    sample_seconds: float = 2e-3,
    seed: int = 0,
    synchronize: Callable[[], None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Samples]:
    """Seconds per call of every entry of ``calls``, taken side by side.

    rounds: samples per engine; each round runs all engines once, in an order drawn from ``seed``, so that a
    machine that slows down slows all of them down.
    warmup_seconds: each engine runs at least so long, and twice at least, before the first round.
    sample_seconds: a call shorter than this is repeated within a sample until the sample is this long.
    synchronize: waits for the device, called before the clock is stopped.
    """
    wait = synchronize or _nothing
    repeats = {}
    for name, call in calls.items():
        once = _warm_up(call, warmup_seconds, wait)
        repeats[name] = max(1, round(sample_seconds / max(once, 1e-9)))
    order = list(calls)
    shuffle = random.Random(seed).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        shuffle(order)
        for name in order:
            seconds[name].append(_sample(calls[name], repeats[name], wait))
        if progress is not None:
            progress(done + 1, rounds)
    return {name: Samples(tuple(values)) for name, values in seconds.items()}


def _warm_up(call: Callable[[], object], seconds: float, wait: Callable[[], None]) -> float:
    """Run for a while; returns the seconds of the fastest call."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < 2 or time.perf_counter() < end:
        taken.append(_sample(call, 1, wait))
    return min(taken)


def _sample(call: Callable[[], object], repeats: int, wait: Callable[[], None]) -> float:
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - started) / repeats


def _nothing() -> None:
    pass
