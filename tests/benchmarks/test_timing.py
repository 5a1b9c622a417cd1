"""How numbers are taken: turns, gaps, repeats, and that a sleep is read as what it is."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import pytest
from dsp_benchmarks.measure import cuda_timing, timing
from dsp_benchmarks.measure.samples import Samples
from dsp_benchmarks.measure.timing import LocalTimer, TimingRules, measure

from dsp_kernels.errors import DSPBackendError


class _Clock:
    """A clock that only moves when a call says so: timing without waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def perf_counter(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(timing.time, "sleep", clock.sleep)
    return clock


def test_a_sleeping_engine_reads_within_two_percent() -> None:
    # 20 ms: a sleep wakes up to 0.1 ms late, half a percent of it.
    sleeper = LocalTimer(lambda: time.sleep(0.02))
    other = LocalTimer(lambda: sum(range(1000)))
    samples = measure({"sleeper": sleeper, "other": other}, TimingRules(rounds=9, warmup=0.05, burst=0.02))
    assert samples["sleeper"].median == pytest.approx(0.02, rel=0.02)


def test_each_engine_reads_its_own_time(clock: _Clock) -> None:
    timers = {
        "slow": LocalTimer(lambda: clock.spend(0.25)),
        "fast": LocalTimer(lambda: clock.spend(0.125)),
    }
    samples = measure(timers, TimingRules(rounds=4, warmup=0.5))
    assert samples["slow"].seconds == (0.25,) * 4
    assert samples["fast"].seconds == (0.125,) * 4


def test_a_burst_holds_as_many_calls_as_fit_and_starts_after_a_gap_and_warm_calls(clock: _Clock) -> None:
    calls = itertools.count()

    def call() -> None:
        # The first call of a turn is slow, as after another engine has used the caches.
        clock.spend(0.25 if next(calls) >= 2 and clock.slept and len(clock.slept) != seen[0] else 2**-8)
        seen[0] = len(clock.slept)

    seen = [0]
    rules = TimingRules(rounds=3, warmup=0, burst=2**-6, warm_calls=2, settle=3 * 2**-8, gap=0.5)
    samples = measure({"one": LocalTimer(call)}, rules)
    assert samples["one"].per_round == 4
    assert samples["one"].seconds == (2**-8,) * 12  # the slow call was a warm one
    assert next(calls) == 2 + 3 * (3 + 4)  # three warm calls fill the time to settle
    assert clock.slept == [0.5] * 3


def test_a_call_shorter_than_a_sample_is_repeated(clock: _Clock) -> None:
    calls = itertools.count()

    def short() -> None:
        next(calls)
        clock.spend(2**-20)

    rules = TimingRules(rounds=3, warmup=0, shortest=2**-10, burst=2**-10, warm_calls=0, settle=0)
    samples = measure({"short": LocalTimer(short)}, rules)
    assert samples["short"].seconds == (2**-20,) * 3
    assert next(calls) == 2 + 3 * 2**10  # two to warm up


def test_throughput_takes_calls_back_to_back(clock: _Clock) -> None:
    calls = itertools.count()

    def call() -> None:
        next(calls)
        clock.spend(2**-6)

    samples = measure({"one": LocalTimer(call)}, TimingRules.throughput(rounds=2, window=0.25))
    assert samples["one"].seconds == (2**-6,) * 2
    warm = 20 + 2 * 2  # 0.3 s of warm-up, then two warm calls in each turn
    assert next(calls) == warm + 2 * 16


def test_a_limit_of_time_ends_the_rounds_after_eight(clock: _Clock) -> None:
    calls = itertools.count()

    def call() -> None:
        next(calls)
        clock.spend(1)

    rules = TimingRules(rounds=50, warmup=0, gap=0.0, most_seconds=9)
    samples = measure({"one": LocalTimer(call)}, rules)
    assert samples["one"].n == 8
    assert next(calls) == 1 + 8  # a long call is warmed up once and has no warm call in its turns
    assert measure({"one": LocalTimer(call)}, replace(rules, most_seconds=31))["one"].n == 30
    assert measure({"one": LocalTimer(call)}, replace(rules, most_seconds=8)) == {}


def test_a_machine_that_slows_down_ends_the_rounds_early(clock: _Clock) -> None:
    calls = itertools.count()
    timer = LocalTimer(lambda: clock.spend(1 if next(calls) < 5 else 2))
    samples = measure({"one": timer}, TimingRules(rounds=50, warmup=0, gap=0.0, most_seconds=21))
    assert 8 <= samples["one"].n < 20
    assert clock.now <= 2 * 21


def test_rounds_run_every_engine_once_in_a_seeded_random_order(clock: _Clock) -> None:
    def orders(seed: int) -> list[str]:
        seen: list[str] = []

        def call(name: str) -> None:
            seen.append(name)
            clock.spend(1)

        timers = {name: LocalTimer(lambda name=name: call(name)) for name in "abcd"}
        measure(timers, TimingRules(rounds=20, warmup=0, warm_calls=0, seed=seed))
        return seen[4:]  # after the warm-up: one call of each, they are long

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

    timer = LocalTimer(lambda: queued.append(0.5), synchronize)
    samples = measure({"queues": timer}, TimingRules(rounds=2, warmup=0))
    assert samples["queues"].seconds == (0.5, 0.5)


@pytest.mark.parametrize(
    ("seconds", "median", "p10", "p90"),
    [((3.0,), 3.0, 3.0, 3.0), (tuple(range(11)), 5, 1, 9), ((4.0, 0.0), 2.0, 0.4, 3.6)],
    ids=["one", "eleven", "two-unsorted"],
)
def test_quantiles(seconds: tuple[float, ...], median: float, p10: float, p90: float) -> None:
    samples = Samples(seconds)
    assert samples.n == len(seconds)
    assert (samples.median, samples.p10, samples.p90) == pytest.approx((median, p10, p90))


@pytest.mark.parametrize(
    ("seconds", "why"),
    [
        ((1.0,) * 7, "only 7 rounds"),
        ((1.0, 1.5) * 6, "known only within 40 %"),
        ((1.0,) * 10 + (1.08,) * 10, "drifted by 8 %"),
        ((1.0,) * 19 + (9.0,), ""),
    ],
    ids=["few", "spread", "drift", "one-outlier-is-no-reason"],
)
def test_no_verdict_from_unstable_samples(seconds: tuple[float, ...], why: str) -> None:
    unstable = Samples(seconds).unstable
    assert why in unstable
    assert bool(why) == bool(unstable)


def test_rounds_are_the_medians_of_neighbouring_calls() -> None:
    assert Samples((1.0, 2.0, 9.0, 4.0, 5.0, 6.0), 3).rounds == (2.0, 5.0)


def test_device_times_need_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_timing.torch.cuda, "is_available", lambda: False)
    with pytest.raises(DSPBackendError, match="torch finds none"):
        cuda_timing.device_times(lambda: None)


def test_device_times_are_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the CUDA stream: enqueueing takes 1 ms, running 4 ms warm and 6 ms after a flush."""
    host, device, cold, slept = [0.0], [0.0], [False], []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = device[0]

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.at - self.at)

    class Flush:
        def zero_(self) -> None:
            device[0] += 0.1
            cold[0] = True

    def call() -> None:
        host[0] += 0.001
        device[0] += 0.006 if cold[0] else 0.004
        cold[0] = False

    cuda = cuda_timing.torch.cuda
    monkeypatch.setattr(cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(cuda, "_sleep", lambda cycles: slept.append(cycles))
    monkeypatch.setattr(cuda_timing.torch, "empty", lambda *args, **kwargs: Flush())
    monkeypatch.setattr(cuda_timing.time, "perf_counter", lambda: host[0])
    times = cuda_timing.device_times(call, repeats=5)
    assert (times.warm, times.cold, times.enqueue) == pytest.approx((0.004, 0.006, 0.001))
    assert len(slept) == 10  # every timed call begins while the device is busy
