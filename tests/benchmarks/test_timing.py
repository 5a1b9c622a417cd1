"""How samples are taken: turns, gaps, warm-up and repeats; and what their statistics say."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from dsp_benchmarks.measure.cuda_timing import device_times
from dsp_benchmarks.measure.samples import Samples
from dsp_benchmarks.measure.timing import Probe, Timer, TimingRules, measure
from fakes import Clock


def test_each_engine_reads_its_own_time(clock: Clock) -> None:
    timers = {
        "slow": Timer(lambda: clock.spend(0.25)),
        "fast": Timer(lambda: clock.spend(0.125)),
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
    samples = measure({"one": Timer(call)}, rules)
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

    samples = measure({"one": Timer(call)}, rules)
    assert samples["one"].seconds == pytest.approx((once,) * 3)
    assert next(calls) == warm + 3 * repeats


def test_the_rounds_of_a_slow_engine_fit_the_time_and_below_eight_it_is_left_out(clock: Clock) -> None:
    calls = itertools.count()

    def call() -> None:
        next(calls)
        clock.spend(1)

    timers = {"one": Timer(call)}
    rules = TimingRules(rounds=50, warmup=0, gap=0.0, most_seconds=9)
    assert measure(timers, rules)["one"].n == 8
    assert next(calls) == 1 + 8  # a long call is warmed up once and has no warm call in its turns
    assert measure(timers, replace(rules, most_seconds=31))["one"].n == 30
    assert measure(timers, replace(rules, most_seconds=8)) == {}
    assert measure(timers, replace(rules, most_seconds=0), always=["one"])["one"].n == 8


def test_a_machine_that_slows_down_ends_the_rounds_early(clock: Clock) -> None:
    calls = itertools.count()
    timer = Timer(lambda: clock.spend(1 if next(calls) < 5 else 2))
    samples = measure({"one": timer}, TimingRules(rounds=50, warmup=0, gap=0.0, most_seconds=21))
    assert 8 <= samples["one"].n < 20
    assert clock.now <= 2 * 21


def test_a_round_runs_every_engine_once_in_a_random_order_of_the_seed(clock: Clock) -> None:
    def orders(seed: int) -> list[str]:
        seen: list[str] = []

        def call(name: str) -> None:
            seen.append(name)
            clock.spend(1)

        timers = {name: Timer(lambda name=name: call(name)) for name in "abcd"}
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

    timer = Timer(lambda: queued.append(0.5), synchronize)
    assert measure({"queues": timer}, TimingRules(rounds=2, warmup=0))["queues"].seconds == (0.5, 0.5)


def test_a_probe_tells_how_busy_the_machine_was(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    load = [1.0]
    cost = {torch.float32: 2**-8, torch.bfloat16: 2**-9}
    monkeypatch.setattr(torch, "mm", lambda a, b, out: clock.spend(load[0] * cost[a.dtype]))
    probe = Probe()
    timers, rules = {"one": Timer(lambda: clock.spend(1))}, TimingRules(rounds=4, warmup=0)
    assert measure(timers, rules, probe=probe)["one"].busy == pytest.approx(1)
    load[0] = 1.5
    samples = measure(timers, rules, probe=probe)["one"]
    assert samples.busy == pytest.approx(1.5)
    assert samples.seconds == (1,) * 4
    assert probe.best == pytest.approx(2**-9)  # of the faster product
    assert measure(timers, rules)["one"].busy is None


def test_quantiles() -> None:
    samples = Samples((4.0, 0.0))
    assert samples.median == 2
    assert [samples.quantile(share) for share in (0.1, 0.9)] == pytest.approx([0.4, 3.6])


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


def test_device_times_separate_warm_cold_and_enqueue(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    """A fake CUDA stream: enqueueing takes 1 ms, running 4 ms with a warm L2 cache and 6 ms after a flush."""
    device, cache = [0.0], ["warm"]

    class Event(SimpleNamespace):
        def record(self) -> None:
            self.at = device[0]

        def elapsed_time(self, end: "Event") -> float:
            return 1e3 * (end.at - self.at)

    def call() -> None:
        clock.spend(0.001)
        device[0] += 0.004 if cache == ["warm"] else 0.006
        cache[:] = ["warm"]

    flush = SimpleNamespace(zero_=lambda: cache.append("flushed"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: flush)
    assert device_times(call, repeats=5) == pytest.approx((0.004, 0.006, 0.001))
