"""How samples are taken: turns, gaps, warm-up and repeats; and what their statistics say."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from dsp_benchmarks.measure.cuda_timing import device_times
from dsp_benchmarks.measure.samples import Samples
from dsp_benchmarks.measure.timing import LocalTimer, TimingRules, measure
from fakes import Clock

from dsp_kernels.errors import DSPBackendError


def test_each_engine_reads_its_own_time(clock: Clock) -> None:
    timers = {
        "slow": LocalTimer(lambda: clock.spend(0.25)),
        "fast": LocalTimer(lambda: clock.spend(0.125)),
    }
    samples = measure(timers, TimingRules(rounds=4, warmup=0.5))
    assert samples["slow"].seconds == (0.25,) * 4
    assert samples["fast"].seconds == (0.125,) * 4


def test_a_turn_is_a_gap_warm_calls_and_as_many_timed_calls_as_fit(clock: Clock) -> None:
    calls = itertools.count()
    gaps = 0

    def call() -> None:
        nonlocal gaps
        next(calls)
        # The first call of a turn is slow, as after another engine has used the caches.
        clock.spend(0.25 if len(clock.slept) > gaps else 2**-8)
        gaps = len(clock.slept)

    rules = TimingRules(rounds=3, warmup=0, burst=2**-6, warm_calls=2, settle=3 * 2**-8, gap=0.5)
    samples = measure({"one": LocalTimer(call)}, rules)
    assert samples["one"].per_round == 4
    assert samples["one"].seconds == (2**-8,) * 12  # the slow call was a warm one
    assert next(calls) == 2 + 3 * (3 + 4)  # three warm calls fill the time to settle
    assert clock.slept == [0.5] * 3


@pytest.mark.parametrize(
    ("rules", "once", "warm", "repeats"),
    [
        (
            TimingRules(rounds=3, warmup=0, shortest=2**-10, burst=2**-10, warm_calls=0, settle=0),
            *(2**-20, 2, 2**10),
        ),
        (TimingRules.throughput(rounds=3, window=0.25), 2**-6, 20 + 3 * 2, 16),
    ],
    ids=["calls-shorter-than-a-sample-are-repeated", "throughput-takes-calls-back-to-back"],
)
def test_one_sample_is_the_mean_of_repeated_calls(
    clock: Clock, rules: TimingRules, once: float, warm: int, repeats: int
) -> None:
    calls = itertools.count()

    def call() -> None:
        next(calls)
        clock.spend(once)

    samples = measure({"one": LocalTimer(call)}, rules)
    assert samples["one"].seconds == pytest.approx((once,) * 3)
    assert next(calls) == warm + 3 * repeats


def test_the_rounds_of_a_slow_engine_fit_the_time_and_below_eight_it_is_left_out(clock: Clock) -> None:
    calls = itertools.count()

    def call() -> None:
        next(calls)
        clock.spend(1)

    timers = {"one": LocalTimer(call)}
    rules = TimingRules(rounds=50, warmup=0, gap=0.0, most_seconds=9)
    assert measure(timers, rules)["one"].n == 8
    assert next(calls) == 1 + 8  # a long call is warmed up once and has no warm call in its turns
    assert measure(timers, replace(rules, most_seconds=31))["one"].n == 30
    assert measure(timers, replace(rules, most_seconds=8)) == {}
    assert measure(timers, replace(rules, most_seconds=0), always=["one"])["one"].n == 8


def test_the_first_engines_are_kept_and_later_ones_if_they_fit(clock: Clock) -> None:
    def timer(seconds: float) -> LocalTimer:
        return LocalTimer(lambda: clock.spend(seconds))

    timers = {"slow": timer(1), "as slow": timer(1), "quick": timer(0.1)}
    rules = TimingRules(rounds=50, warmup=0, gap=0.0, most_seconds=14)
    assert list(measure(timers, rules)) == ["slow", "quick"]


def test_a_machine_that_slows_down_ends_the_rounds_early(clock: Clock) -> None:
    calls = itertools.count()
    timer = LocalTimer(lambda: clock.spend(1 if next(calls) < 5 else 2))
    samples = measure({"one": timer}, TimingRules(rounds=50, warmup=0, gap=0.0, most_seconds=21))
    assert 8 <= samples["one"].n < 20
    assert clock.now <= 2 * 21


def test_a_round_runs_every_engine_once_in_a_random_order_of_the_seed(clock: Clock) -> None:
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


def test_the_clock_stops_after_the_device_has_finished(clock: Clock) -> None:
    queued: list[float] = []

    def synchronize() -> None:
        while queued:
            clock.spend(queued.pop())

    timer = LocalTimer(lambda: queued.append(0.5), synchronize)
    assert measure({"queues": timer}, TimingRules(rounds=2, warmup=0))["queues"].seconds == (0.5, 0.5)


@pytest.mark.parametrize(
    ("seconds", "median", "p10", "p90"),
    [((3.0,), 3.0, 3.0, 3.0), (tuple(range(11)), 5, 1, 9), ((4.0, 0.0), 2.0, 0.4, 3.6)],
    ids=["one", "eleven", "two-unsorted"],
)
def test_quantiles(seconds: tuple[float, ...], median: float, p10: float, p90: float) -> None:
    samples = Samples(seconds)
    found = samples.median, samples.quantile(0.1), samples.quantile(0.9)
    assert (samples.n, *found) == pytest.approx((len(seconds), median, p10, p90))


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
def test_unstable_samples_allow_no_verdict(seconds: tuple[float, ...], why: str) -> None:
    unstable = Samples(seconds).unstable
    assert why in unstable
    assert bool(why) == bool(unstable)


def test_a_round_is_the_median_of_its_calls() -> None:
    assert Samples((1.0, 2.0, 9.0, 4.0, 5.0, 6.0), 3).rounds == (2.0, 5.0)


def test_device_times_need_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DSPBackendError, match="torch finds none"):
        device_times(lambda: None)


def test_device_times_separate_warm_cold_and_enqueue(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """A fake CUDA stream: enqueueing takes 1 ms, running 4 ms with a warm L2 cache and 6 ms after a flush."""
    device, cold, slept = [0.0], [False], []

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
        clock.spend(0.001)
        device[0] += 0.006 if cold[0] else 0.004
        cold[0] = False

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: slept.append(cycles))
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: Flush())
    times = device_times(call, repeats=5)
    assert (times.warm, times.cold, times.enqueue) == pytest.approx((0.004, 0.006, 0.001))
    assert len(slept) == 10  # every timed call begins while the device is busy
