"""A run ends within its stated time, times the most important engines first, and says what it left out."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from dsp_benchmarks.cases import Case
from dsp_benchmarks.engines import ENGINES, Engine, Runner
from dsp_benchmarks.measure.timing import TimingRules, shared_rounds
from dsp_benchmarks.report.results import Row
from dsp_benchmarks.run import run_cases, time_shares
from dsp_benchmarks.subjects.networks import Network
from fakes import Clock
from torch import Tensor, nn


@dataclass(frozen=True)
class Sleeper(Engine):
    """The right answer after a sleep for each image; building it is a sleep too."""

    name: str = ""
    build: float = 0.1
    per_image: float = 0.001
    clock: Clock | None = None
    built: list[str] | None = None

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        assert self.clock is not None
        clock = self.clock
        clock.sleep(self.build)
        if self.built is not None:
            self.built.append(self.name)
        answers: dict[int, Tensor] = {}

        def run(x: Tensor) -> Tensor:
            clock.sleep(self.per_image * len(x))
            if len(x) not in answers:
                answers[len(x)] = model(x).detach()
            return answers[len(x)]

        return run


RULES = TimingRules(rounds=20, warmup=0.1)


Bench = Callable[[float | None, dict[str, Sleeper]], dict[tuple[str, int], Row]]


@pytest.fixture
def bench(network: Network, monkeypatch: pytest.MonkeyPatch, clock: Clock) -> Bench:
    """Runs made-up engines, by label, on two batch sizes that take 1/3 and 2/3 of the time."""

    def run(seconds: float | None, engines: dict[str, Sleeper]) -> dict[tuple[str, int], Row]:
        cases = [Case(*label.split("/")) for label in engines]
        for case, engine in zip(cases, engines.values(), strict=True):
            monkeypatch.setitem(ENGINES, case.engine, replace(engine, name=case.engine, clock=clock))
        shares = time_shares(seconds, [1.0, 2.0])
        rows = run_cases(network, [1, 8], cases, RULES, short=True, budget=shares)
        assert len(rows) == 2 * len(cases)
        assert all(row.samples is not None or row.reason for row in rows)
        return {(row.engine, row.batch): row for row in rows}

    return run


@pytest.mark.parametrize("seconds", [5.0, 12.0, 40.0])
def test_a_run_ends_within_its_time(bench: Bench, clock: Clock, seconds: float) -> None:
    rows = bench(
        seconds,
        {
            "packed/quick": Sleeper(),
            "packed/middling": Sleeper(build=0.2, per_image=0.01),
            "packed/slow": Sleeper(build=0.2, per_image=0.1),
            "packed/compiles": Sleeper(build=4.0, slow_build=True),
        },
    )
    assert clock.now <= seconds + (0 if seconds == 40 else 4)  # a build that has begun is finished
    if seconds >= 12:
        assert all(len(rows["packed/quick", batch].timed.rounds) >= 8 for batch in (1, 8))


def test_an_engine_that_does_not_fit_is_skipped_with_a_reason(bench: Bench) -> None:
    rows = bench(24.0, {"packed/quick": Sleeper(), "packed/slow": Sleeper(per_image=1.0)})
    assert rows["packed/quick", 8].status == "ok"
    assert rows["packed/slow", 8].status == "skipped"
    assert "8 rounds do not fit" in rows["packed/slow", 8].reason


KEY = ("dense/openvino", "dense/onnxruntime", "packed/fused:cpu")


@pytest.mark.parametrize("slow_build", [0.5, 200.0], ids=["in-time", "one-build-takes-all-the-time"])
def test_the_dense_baselines_and_the_native_network_are_timed_whatever_else_runs(
    bench: Bench, slow_build: float
) -> None:
    """Though they stand last in the table and many other engines are faster."""
    others = {f"packed/other-{number}": Sleeper(build=0.5) for number in range(30)}
    others["packed/compiles"] = Sleeper(build=slow_build, slow_build=True)
    rows = bench(60.0, others | dict.fromkeys(KEY, Sleeper(build=1.0, per_image=0.05)))
    for batch in (1, 8):
        assert all(len(rows[label, batch].timed.rounds) >= 8 for label in KEY)
    skipped = [label for (label, _), row in rows.items() if row.status == "skipped"]
    assert skipped
    assert set(skipped).isdisjoint(KEY)


def test_a_slow_build_is_not_begun_if_one_like_the_last_would_not_fit(bench: Bench, clock: Clock) -> None:
    compiles = Sleeper(build=40.0, slow_build=True)
    rows = bench(90.0, {"packed/first": compiles, "packed/second": compiles})
    assert rows["packed/first", 8].status == "ok"
    assert "building the others took the time" in rows["packed/second", 8].reason
    assert clock.now <= 90


def test_an_engine_for_any_batch_size_is_built_once(bench: Bench) -> None:
    built: list[str] = []
    one = Sleeper(build=1.0, built=built)
    rows = bench(None, {"packed/once": replace(one, any_batch=True), "packed/each": one})
    assert [row.build_seconds for row in rows.values()] == [1.0] * 4
    assert sorted(built) == ["each", "each", "once"]


def test_time_that_one_part_leaves_goes_to_the_next(clock: Clock) -> None:
    shares = time_shares(12.0, [1.0, 2.0, 3.0])
    assert next(shares) == pytest.approx(2.0)
    clock.sleep(1.0)
    assert next(shares) == pytest.approx(11 * 2 / 5)
    clock.sleep(20.0)
    assert next(shares) == 0.0
    assert next(time_shares(None, [1.0])) == float("inf")


def test_rounds_are_shared_by_time() -> None:
    assert shared_rounds({"a": 0.1, "b": 1.0}, 20, 100.0) == {"a": 20, "b": 20}
    assert shared_rounds({"a": 0.1, "b": 1.0}, 20, 14.5) == {"a": 20, "b": 12}
    assert shared_rounds({"a": 0.1, "b": 1.0}, 20, 1.0) == {"a": 8, "b": 8}
    assert shared_rounds({"a": 0.1}, 3, 0.5) == {"a": 3}
    assert shared_rounds({"a": 0.1}, 20, float("inf")) == {"a": 20}
