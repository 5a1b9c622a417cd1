"""How numbers are taken: interleaving, repeats, quantiles."""

from __future__ import annotations

import itertools

import pytest
from dsp_benchmarks import timing
from dsp_benchmarks.timing import Samples, measure


class _Clock:
    """A clock that only moves when a call says so: timing without waiting."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
    return clock


def test_each_engine_reads_its_own_time(clock: _Clock) -> None:
    samples = measure(
        {"slow": lambda: clock.spend(0.25), "fast": lambda: clock.spend(0.125)}, rounds=4, warmup_seconds=0.5
    )
    assert samples["slow"].seconds == (0.25,) * 4
    assert samples["fast"].seconds == (0.125,) * 4


def test_a_call_shorter_than_a_sample_is_repeated(clock: _Clock) -> None:
    calls = itertools.count()

    def short() -> None:
        next(calls)
        clock.spend(2**-20)

    samples = measure({"short": short}, rounds=3, warmup_seconds=0, sample_seconds=2**-10)
    assert samples["short"].seconds == (2**-20,) * 3
    assert next(calls) == 2 + 3 * 2**10  # two to warm up


def test_rounds_run_every_engine_once_in_a_seeded_random_order(clock: _Clock) -> None:
    def orders(seed: int) -> list[str]:
        seen: list[str] = []

        def call(name: str) -> None:
            seen.append(name)
            clock.spend(1)

        measure(
            {name: lambda name=name: call(name) for name in "abcd"}, rounds=20, warmup_seconds=0, seed=seed
        )
        return seen[8:]  # after the warm-up

    seen = orders(3)
    rounds = ["".join(seen[i : i + 4]) for i in range(0, 80, 4)]
    assert {"".join(sorted(one)) for one in rounds} == {"abcd"}
    assert len(set(rounds)) > 5
    assert orders(3) == seen
    assert orders(4) != seen


def test_the_device_is_waited_for_before_the_clock_stops(clock: _Clock) -> None:
    """Work that was only queued counts in the sample that queued it."""
    queued: list[float] = []

    def synchronize() -> None:
        while queued:
            clock.spend(queued.pop())

    samples = measure(
        {"queues": lambda: queued.append(0.5)}, rounds=2, warmup_seconds=0, synchronize=synchronize
    )
    assert samples["queues"].seconds == (0.5, 0.5)


def test_warm_up_lasts_as_long_as_asked(clock: _Clock) -> None:
    calls = itertools.count()

    def call() -> None:
        next(calls)
        clock.spend(0.5)

    measure({"one": call}, rounds=1, warmup_seconds=2)
    assert next(calls) == 4 + 1


@pytest.mark.parametrize(
    ("seconds", "median", "p10", "p90"),
    [((3.0,), 3.0, 3.0, 3.0), (tuple(range(11)), 5, 1, 9), ((4.0, 0.0), 2.0, 0.4, 3.6)],
    ids=["one", "eleven", "two-unsorted"],
)
def test_quantiles(seconds: tuple[float, ...], median: float, p10: float, p90: float) -> None:
    samples = Samples(seconds)
    assert samples.n == len(seconds)
    assert (samples.median, samples.p10, samples.p90) == pytest.approx((median, p10, p90))
