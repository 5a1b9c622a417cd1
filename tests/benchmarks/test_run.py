"""Which cases are run; only an engine with the right answer is timed; what the rows say."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import closing

import pytest
import torch
from bench_rows import SMALL
from dsp_benchmarks.cases import (
    Case,
    allowed_difference,
    build_case,
    case_input,
    check,
    choose_cases,
    default_cases,
)
from dsp_benchmarks.engines import ENGINES
from dsp_benchmarks.measure.isolation import IsolatedEngine
from dsp_benchmarks.run import run_cases, time_runners
from dsp_benchmarks.subjects.networks import Network
from fakes import QUICK, FakeEngine
from torch import Tensor

from dsp_kernels.errors import DSPBackendError, DSPVerificationError

X = torch.linspace(-1, 1, 30).view(3, 10)


def _wrong(x: Tensor) -> Tensor:
    return x + 2e-4


def _not_a_number(x: Tensor) -> Tensor:
    return torch.full_like(x, float("nan"))


def _shorter(x: Tensor) -> Tensor:
    return x[:2]


@pytest.mark.parametrize("engine", [_wrong, _not_a_number, _shorter])
def test_a_wrong_answer_is_an_error_before_anything_is_timed(engine: Callable[[Tensor], Tensor]) -> None:
    calls: list[str] = []

    def right(x: Tensor) -> Tensor:
        calls.append("right")
        return x

    with pytest.raises(DSPVerificationError, match="engine 'broken'"):
        time_runners({"right": right, "broken": engine}, X, X, 1e-4, rules=QUICK)
    assert calls == ["right"]  # checked, never timed


def test_a_right_answer_passes_with_its_difference() -> None:
    assert check("close", lambda x: x + 5e-5, X, X, 1e-4) == (pytest.approx(5e-5, rel=1e-2), "")


def test_another_network_may_be_timed_unchecked() -> None:
    rows = time_runners({"same": lambda x: x, "other": _wrong}, X, X, 1e-4, unchecked=("other",), rules=QUICK)
    assert [(row.engine, row.batch, row.difference) for row in rows] == [("same", 3, 0.0), ("other", 3, None)]


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (0.0, "ok", ""),
        (0.5, "wrong", "is off by 0.5"),
        (float("nan"), "wrong", "is off by nan"),
        (float("inf"), "failed", "RuntimeError: the vendor's library broke"),
    ],
    ids=["right", "wrong", "not-a-number", "breaks"],
)
def test_only_a_right_engine_is_timed_and_every_other_is_a_row_with_its_reason(
    network: Network, monkeypatch: pytest.MonkeyPatch, error: float, status: str, reason: str
) -> None:
    fake = FakeEngine(error=error)
    monkeypatch.setitem(ENGINES, "fake", fake)
    (row,) = run_cases(network, [2], [Case("packed", "fake")], QUICK)
    assert row.status == status
    assert reason in row.reason
    assert (row.samples is not None) == (status == "ok")
    if status == "wrong":
        assert len(fake.calls) == 1  # the check
        assert row.difference == pytest.approx(error, nan_ok=True)


def test_the_tolerance_follows_the_precision(network: Network) -> None:
    expected = torch.ones(2, 10)
    program = network.program("packed")
    bounds = [allowed_difference(program, t, expected) for t in (torch.float32, torch.bfloat16)]
    assert bounds[0] < 1e-4 < bounds[1]
    assert allowed_difference(program, torch.float32, 3 * expected) == pytest.approx(3 * bounds[0])


def test_every_default_engine_is_a_row_with_times_or_a_reason(network: Network) -> None:
    cases = [case for case in default_cases() if not case.engine.startswith("compile")]
    rows = run_cases(network, [2], cases, QUICK)
    assert [row.engine for row in rows] == [case.label for case in cases]
    for row in rows:
        assert row.status in ("ok", "unavailable"), row
        assert (row.samples is not None) == (row.status == "ok")
        assert bool(row.reason) == (row.status != "ok")
    ran = {row.engine for row in rows if row.status == "ok"}
    assert {"dense/torch", "packed/torchscript-opt", "compacted/torch-nhwc", "filters/torch-nhwc"} <= ran
    assert any(name.startswith("packed/fused:") for name in ran)
    (released,) = [row for row in rows if row.form == "released"]
    assert "only a network that the authors released" in released.reason


def test_a_short_plan_builds_slow_engines_once(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "fake", FakeEngine(slow_build=True))
    rows = run_cases(network, [1, 2], [Case("packed", "fake")], QUICK, short=True)
    assert [(row.batch, row.status) for row in rows] == [(1, "skipped"), (2, "ok")]
    assert "for batch 2 only" in rows[0].reason


def test_the_input_is_the_same_everywhere(network: Network) -> None:
    assert torch.equal(case_input(network, 3, 7), case_input(network, 3, 7))
    assert not torch.equal(case_input(network, 3, 7), case_input(network, 3, 8))


def test_an_isolated_engine_answers_from_its_own_process_and_says_that_it_died() -> None:
    with closing(IsolatedEngine(SMALL, Case("packed", "torch"), 2)) as engine:
        assert engine.row.status == "ok"
        assert engine.row.difference == 0.0
        assert engine.warm_up(0.0) > 0
        assert len(engine.burst(1, 3, 1)) == 3
        assert engine.pid != os.getpid()
        os.kill(engine.pid, signal.SIGKILL)
        with pytest.raises(DSPBackendError, match="the process of packed/torch failed"):
            engine.burst(1, 3, 1)


def test_choosing_cases() -> None:
    assert choose_cases(engines=["torch"], forms=["packed"]) == [Case("packed", "torch")]
    forms = [case.form for case in choose_cases(engines=["torch"])]
    assert forms == ["dense", "packed", "compacted", "filters"]
    assert {case.form for case in choose_cases(forms=["filters"])} == {"filters"}
    mixed = choose_cases(engines=["dense/openvino", "torch"], forms=["packed"])
    assert mixed == [Case("dense", "openvino"), Case("packed", "torch")]
    assert choose_cases(engines=["dense/openvino"]) == [Case("dense", "openvino")]
    with pytest.raises(DSPBackendError, match="unknown engine or form 'squeezed'; known are dense"):
        choose_cases(engines=["squeezed/torch"])
    with pytest.raises(DSPBackendError, match="unknown engine or form 'warp'; known are torch"):
        choose_cases(engines=["warp"])


def test_an_engine_of_another_device_says_so(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "fake", FakeEngine(device="cuda"))
    monkeypatch.setattr(FakeEngine, "available", lambda _: (True, ""))
    row, run = build_case(Case("packed", "fake"), network, case_input(network, 1, 0))
    assert run is None
    assert row.reason == "it runs on cuda only, this run is on cpu"
