"""A run ends within its stated time, and says of every engine what it left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from dsp_benchmarks import cases as case_module
from dsp_benchmarks import run as budget_module
from dsp_benchmarks import run as run_module
from dsp_benchmarks.cases import Case
from dsp_benchmarks.engines import ENGINES
from dsp_benchmarks.measure import timing
from dsp_benchmarks.measure.timing import TimingRules, shared_rounds
from dsp_benchmarks.run import Budget, run_cases
from dsp_benchmarks.subjects.networks import Network
from torch import Tensor, nn


class _Clock:
    """Only a sleep moves it."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    clock = _Clock()
    fake = SimpleNamespace(perf_counter=clock.perf_counter, sleep=clock.sleep)
    for module in (budget_module, case_module, run_module, timing):
        monkeypatch.setattr(module, "time", fake)
    return clock


@dataclass(frozen=True)
class _Sleeper:
    """The right answer after a sleep for each image; building it is a sleep too."""

    clock: _Clock
    build: float
    per_image: float
    slow_build: bool = False
    any_batch: bool = False
    name: str = "sleeper"
    device: str = "any"
    dtype: torch.dtype = torch.float32

    def available(self) -> tuple[bool, str]:
        return True, ""

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        self.clock.sleep(self.build)
        answer = model(example).detach()
        answers = {len(example): answer}

        def run(x: Tensor) -> Tensor:
            self.clock.sleep(self.per_image * len(x))
            if len(x) not in answers:
                answers[len(x)] = model(x).detach()
            return answers[len(x)]

        return run


def _measure(
    network: Network, monkeypatch: pytest.MonkeyPatch, seconds: float, **engines: _Sleeper
) -> list[run_module.Row]:
    for name, engine in engines.items():
        monkeypatch.setitem(ENGINES, name, engine)
    cases = [Case("packed", name) for name in engines]
    return run_cases(
        network,
        [1, 8],
        cases,
        TimingRules(rounds=20, warmup=0.1),
        short=True,
        budget=Budget(seconds, [1.0, 2.0]),
    )


@pytest.mark.parametrize("seconds", [5.0, 12.0, 40.0])
def test_a_run_ends_within_its_time(
    network: Network, monkeypatch: pytest.MonkeyPatch, clock: _Clock, seconds: float
) -> None:
    rows = _measure(
        network,
        monkeypatch,
        seconds,
        quick=_Sleeper(clock, 0.1, 0.001),
        middling=_Sleeper(clock, 0.2, 0.01),
        slow=_Sleeper(clock, 0.2, 0.1),
        compiles=_Sleeper(clock, 4.0, 0.001, slow_build=True),
    )
    assert clock.now <= seconds + 4.0  # a build that has begun is finished
    assert len(rows) == 8
    assert all(row.samples is not None or row.reason for row in rows)
    if seconds < 12:
        return
    if seconds >= 40:  # enough for every build to fit
        assert clock.now <= seconds
    quick = [row for row in rows if row.runner == "quick"]
    assert all(row.samples is not None and len(row.samples.rounds) >= 8 for row in quick)


def test_slow_engines_have_fewer_rounds_but_enough(
    network: Network, monkeypatch: pytest.MonkeyPatch, clock: _Clock
) -> None:
    engines = {"quick": _Sleeper(clock, 0.1, 0.001), "slow": _Sleeper(clock, 0.1, 0.1)}
    rows = _measure(network, monkeypatch, 22.0, **engines)
    rounds = {(row.runner, row.batch): len(row.timed.rounds) for row in rows}
    assert rounds["quick", 8] == 20
    assert 8 <= rounds["slow", 8] < 20
    assert clock.now <= 22


def test_what_does_not_fit_is_a_row_that_says_so(
    network: Network, monkeypatch: pytest.MonkeyPatch, clock: _Clock
) -> None:
    engines = {"quick": _Sleeper(clock, 0.1, 0.001), "slow": _Sleeper(clock, 0.1, 1.0)}
    rows = {(row.runner, row.batch): row for row in _measure(network, monkeypatch, 24.0, **engines)}
    assert rows["quick", 8].status == "ok"
    assert rows["slow", 8].status == "skipped"
    assert "8 rounds do not fit" in rows["slow", 8].reason


def test_a_build_that_runs_late_does_not_cost_the_others_their_timing(
    network: Network, monkeypatch: pytest.MonkeyPatch, clock: _Clock
) -> None:
    engines = {"quick": _Sleeper(clock, 0.1, 0.001), "late": _Sleeper(clock, 30.0, 0.001)}
    rows = {(row.runner, row.batch): row for row in _measure(network, monkeypatch, 30.0, **engines)}
    assert rows["quick", 1].status == "ok"


def test_an_engine_for_any_batch_size_is_built_once(
    network: Network, monkeypatch: pytest.MonkeyPatch, clock: _Clock
) -> None:
    built: list[str] = []

    def prepare(engine: _Sleeper, model: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], float]:
        built.append(engine.name)
        return engine.prepare(model, x), 1.0

    monkeypatch.setattr(case_module, "_prepare", prepare)
    once = _Sleeper(clock, 1.0, 0.001, any_batch=True, name="once")
    rows = _measure(network, monkeypatch, 100.0, once=once, each=_Sleeper(clock, 1.0, 0.001, name="each"))
    assert [row.build_seconds for row in rows] == [1.0] * 4
    assert sorted(built) == ["each", "each", "once"]


def test_time_that_one_part_leaves_goes_to_the_next(clock: _Clock) -> None:
    budget = Budget(12.0, [1.0, 2.0, 3.0])
    assert budget.next_part() == pytest.approx(2.0)
    clock.sleep(1.0)
    assert budget.next_part() == pytest.approx(11 * 2 / 5)
    clock.sleep(20.0)
    assert budget.next_part() == 0.0
    assert Budget(None, [1.0]).next_part() is None


def test_rounds_are_shared_by_time() -> None:
    assert shared_rounds({"a": 0.1, "b": 1.0}, 20, 100.0) == {"a": 20, "b": 20}
    shared = shared_rounds({"a": 0.1, "b": 1.0}, 20, 14.5)
    assert shared == {"a": 20, "b": 12}
    assert shared_rounds({"a": 0.1, "b": 1.0, "c": 0.2}, 20, 8.0) == {"a": 20, "c": 20}
    assert shared_rounds({"a": 0.1}, 20, 0.1) == {}
    assert shared_rounds({"a": 0.1}, 3, 0.5) == {"a": 3}
