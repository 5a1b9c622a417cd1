"""Correct first, timed second: the gate, the cases, the engines on a real network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from bench_rows import SMALL
from dsp_benchmarks import cases as case_module
from dsp_benchmarks.__main__ import main
from dsp_benchmarks.accuracy import Labelled, accuracy
from dsp_benchmarks.cases import Case, build_case, case_input, default_cases
from dsp_benchmarks.engines import ENGINES
from dsp_benchmarks.engines.fused import Fused
from dsp_benchmarks.gate import allowed_difference, check
from dsp_benchmarks.isolation import IsolatedEngine
from dsp_benchmarks.networks import Network, NetworkSource, load_network
from dsp_benchmarks.peaks import Peaks
from dsp_benchmarks.profiles import profile_engine
from dsp_benchmarks.results import read_result
from dsp_benchmarks.run import choose_cases, run_cases, time_runners
from dsp_benchmarks.timing import TimingRules
from torch import Tensor, nn

from dsp_kernels.errors import DSPBackendError, DSPVerificationError

X = torch.linspace(-1, 1, 30).view(3, 10)
QUICK = TimingRules(rounds=2, warmup=0.0, gap=0.0, burst=0.0)


def _wrong(x: Tensor) -> Tensor:
    return x + 2e-4


def _not_a_number(x: Tensor) -> Tensor:
    return torch.full_like(x, float("nan"))


def _shorter(x: Tensor) -> Tensor:
    return x[:2]


@pytest.mark.parametrize("engine", [_wrong, _not_a_number, _shorter])
def test_a_wrong_engine_is_refused_before_anything_is_timed(engine: Callable[[Tensor], Tensor]) -> None:
    calls: list[str] = []

    def right(x: Tensor) -> Tensor:
        calls.append("right")
        return x

    with pytest.raises(DSPVerificationError, match="engine 'broken'"):
        time_runners({"right": right, "broken": engine}, X, X, 1e-4, rules=QUICK)
    assert calls == ["right"]  # checked, never timed


def test_a_right_engine_passes_with_its_difference() -> None:
    checked = check("close", lambda x: x + 5e-5, X, X, 1e-4)
    assert checked.error == ""
    assert checked.difference == pytest.approx(5e-5, rel=1e-2)


def test_another_network_may_be_shown_unchecked() -> None:
    rows = time_runners({"same": lambda x: x, "other": _wrong}, X, X, 1e-4, unchecked=("other",), rules=QUICK)
    assert [(row.engine, row.batch, row.difference) for row in rows] == [("same", 3, 0.0), ("other", 3, None)]


@dataclass(frozen=True)
class _Fake:
    """The packed network with an error added to its answer; counts its calls."""

    error: float
    calls: list[int]
    name: str = "fake"
    device: str = "any"
    dtype: torch.dtype = torch.float32
    slow_build: bool = False
    any_batch: bool = False

    def available(self) -> tuple[bool, str]:
        return True, ""

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        if self.error == float("inf"):
            raise RuntimeError("the vendor's library broke")

        def run(x: Tensor) -> Tensor:
            self.calls.append(1)
            with torch.no_grad():
                return model(x) + self.error

        return run


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
def test_only_a_right_engine_is_timed_and_every_other_is_a_row(
    network: Network, monkeypatch: pytest.MonkeyPatch, error: float, status: str, reason: str
) -> None:
    fake = _Fake(error, [])
    monkeypatch.setitem(ENGINES, "fake", fake)
    (row,) = run_cases(network, [2], [Case("packed", "fake")], QUICK)
    assert row.status == status
    assert reason in row.reason
    assert (row.samples is not None) == (status == "ok")
    if status == "wrong":
        assert len(fake.calls) == 1  # the gate's
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
    monkeypatch.setitem(ENGINES, "fake", _Fake(0.0, [], slow_build=True))
    rows = run_cases(network, [1, 2], [Case("packed", "fake")], QUICK, short=True)
    assert [(row.batch, row.status) for row in rows] == [(1, "skipped"), (2, "ok")]
    assert "for batch 2 only" in rows[0].reason


def test_the_input_is_the_same_everywhere(network: Network) -> None:
    assert torch.equal(case_input(network, 3, 7), case_input(network, 3, 7))
    assert not torch.equal(case_input(network, 3, 7), case_input(network, 3, 8))


def test_an_isolated_engine_answers_from_its_own_process() -> None:
    engine = IsolatedEngine(SMALL, Case("packed", "torch"), 2)
    try:
        assert engine.row.status == "ok"
        assert engine.row.difference == 0.0
        assert engine.warm_up(0.0) > 0
        assert len(engine.burst(1, 3, 1)) == 3
        assert engine._process.pid != torch.multiprocessing.current_process().pid
    finally:
        engine.close()
    assert not engine._process.is_alive()
    with pytest.raises(DSPBackendError, match="packed/torch gave no answer"):
        engine._receive()


def test_choosing_cases() -> None:
    assert choose_cases(engines=["torch"], forms=["packed"]) == [Case("packed", "torch")]
    assert [case.form for case in choose_cases(engines=["torch"])] == [
        "dense",
        "packed",
        "compacted",
        "filters",
    ]
    assert {case.form for case in choose_cases(forms=["filters"])} == {"filters"}
    mixed = choose_cases(engines=["dense/openvino", "torch"], forms=["packed"])
    assert mixed == [Case("dense", "openvino"), Case("packed", "torch")]
    assert choose_cases(engines=["dense/openvino"]) == [Case("dense", "openvino")]
    with pytest.raises(DSPBackendError, match="unknown engine or form 'squeezed'; known are dense"):
        choose_cases(engines=["squeezed/torch"])
    with pytest.raises(DSPBackendError, match="unknown engine or form 'warp'; known are torch"):
        choose_cases(engines=["warp"])


def test_an_engine_of_another_device_says_so(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(case_module.ENGINES, "fake", _Fake(0.0, [], device="cuda"))
    row, run = build_case(Case("packed", "fake"), network, case_input(network, 1, 0))
    assert run is None
    assert row.reason == "it runs on cuda only, this run is on cpu"


PEAKS = Peaks({"float32": 1e12, "bfloat16": 2e12}, 1e11, 0.0, 1, {})


@pytest.mark.parametrize("name", ["torch", "torchscript", "openvino"])
def test_a_profile_names_parts_that_take_time(network: Network, name: str) -> None:
    able, reason = ENGINES[name].available()
    if not able:
        pytest.skip(reason)
    parts = profile_engine(name, network.form("packed"), case_input(network, 2, 0), PEAKS)
    seconds = [part.seconds for part in parts]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(seconds) > 0
    if name == "torch":
        floors = {part.name: part.floor for part in parts}
        assert {"conv_1_3x3", "stage_1.0.conv_a", "classifier"} <= set(floors)
        assert floors["bn_1"] is None
        conv = network.packed.get_submodule("conv_1_3x3")
        assert floors["conv_1_3x3"] == max(
            2 * 2 * conv.weight.numel() * 256 / 1e12, 4 * (2 * (3 + 16) * 256 + conv.weight.numel()) / 1e11
        )
    if name == "openvino":  # its names come from the exported graph
        dense = profile_engine(name, network.form("dense"), case_input(network, 2, 0), PEAKS)
        convs = [part for part in dense if part.name.startswith("/") and "/Conv" in part.name]
        assert len(convs) >= 7
        assert all(part.floor for part in convs)


def test_a_profile_of_a_fused_network_has_every_step_and_adds_up(network: Network) -> None:
    parts = profile_engine("fused:eager", network.form("packed"), case_input(network, 2, 0), PEAKS)
    steps = network.program("packed").steps
    assert [part.name.partition(":")[0] for part in parts] == [step.output for step in steps]
    assert sum(part.seconds for part in parts) > 0
    assert all((part.floor or 0) > 0 for part in parts)


def test_accuracy_counts_labelled_images_in_whole_batches() -> None:
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    images = torch.nn.functional.one_hot(labels, 3).float().view(7, 3, 1, 1)
    labelled = Labelled(images, torch.tensor([0, 1, 2, 0, 1, 2, 1]))  # the last is another class
    sizes = set()

    def run(x: Tensor) -> Tensor:
        sizes.add(len(x))
        return x.flatten(1)

    assert accuracy(run, labelled, 3) == pytest.approx(6 / 7)
    assert sizes == {3}


def test_sixteen_bit_rows_of_a_real_network_have_their_accuracy(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSP_SHARED", str(shared))
    real = load_network(NetworkSource("resnet20_g4"))
    assert real.labelled is not None
    assert len(real.labelled.labels) == 1017
    real.labelled = Labelled(real.labelled.images[:60], real.labelled.labels[:60])
    # In plain PyTorch, so that it runs without the extension too.
    monkeypatch.setitem(ENGINES, "fused:cpu", Fused("fused:cpu", "eager"))
    names = [
        "packed/fused:cpu",
        "packed/fused:eager",
        "packed/openvino-bf16",
        "packed/torch",
        "dense/fused:cpu",
    ]
    rows = run_cases(real, [2, 64], choose_cases(engines=names), QUICK)
    counted = {(row.engine, row.batch): row.accuracy for row in rows}
    assert counted["packed/fused:cpu", 2] == counted["packed/fused:cpu", 64]
    with np.load(shared / "golden" / "logits.npz") as golden:
        found = torch.from_numpy(golden["resnet20_g4"][:60]).argmax(1)
    right = float((found == real.labelled.labels).float().mean())
    assert counted["packed/fused:cpu", 64] == pytest.approx(right, abs=1e-6)
    half = counted["packed/openvino-bf16", 64]
    assert half is None or abs(half - right) <= 0.02  # bfloat16 may turn a close decision or two
    assert counted["packed/torch", 64] is None  # the reference itself
    assert counted["packed/fused:eager", 64] is None  # slow, and as exact as the native one
    assert counted["dense/fused:cpu", 64] is None  # random weights


def test_the_native_executor_says_whether_it_runs_sixteen_bit(network: Network) -> None:
    able, reason = ENGINES["fused:cpu:bf16"].available()
    row, _ = build_case(Case("packed", "fused:cpu:bf16"), network, case_input(network, 1, 0))
    assert row.status == ("ok" if able else "unavailable"), row.reason
    assert able or reason == row.reason != ""


def test_a_real_network_through_the_command(
    shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DSP_SHARED", str(shared))
    out = tmp_path / "result.json"
    engines = [flag for name in ("torch", "torchscript", "fused:eager") for flag in ("--engine", name)]
    forms = [flag for name in ("released", "packed") for flag in ("--form", name)]
    flags = ["--net", "resnet20_g4", "--batch", "2", "--rounds", "2", "--out", str(out), *engines, *forms]
    assert main(["run", *flags]) == 0
    assert "packed/fused:eager" in capsys.readouterr().out
    (run,) = read_result(out).runs
    assert run.flop_ratio == pytest.approx(2.664, abs=1e-3)
    assert [row.engine for row in run.rows if row.status == "ok"] == [
        f"{form}/{engine}"
        for form in ("released", "packed")
        for engine in ("torch", "torchscript", "fused:eager")
    ]
    assert all(row.difference is not None and row.difference <= 2e-5 for row in run.rows)
    assert all(row.floor and row.build_seconds for row in run.rows)
    about = json.loads(out.read_text())["environment"]
    assert about["torch"] == torch.__version__
    assert about["commit"]


def test_a_wrong_engine_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENGINES, "fake", _Fake(0.5, []))
    flags = ["--net", SMALL.name, "--structure", str(SMALL.structure), "--image-size", "16", "--batch", "1"]
    flags += ["--engine", "fake", "--form", "packed", "--out", str(tmp_path / "a.json"), "--rounds", "1"]
    assert main(["run", *flags]) == 1
    assert "error: packed/fake, batch 1: engine 'packed/fake' is off by" in capsys.readouterr().err


def test_a_missing_or_foreign_net_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    for name, words in (
        ("none.npz", "none.npz"),
        ("text.npz", "not an .npz file of a released network"),
        ("other.npz", "not an .npz file of a released network"),
        ("resnet19", "is unknown"),
        ("resnet18", "is not pruned: give a structure"),
    ):
        net = str(tmp_path / name) if name.endswith(".npz") else name
        assert main(["run", "--net", net, "--engine", "torch", "--rounds", "1"]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rounds", "0"], "--rounds is 0; expected more than 0"),
        (["--threads", "-1"], "--threads is -1; expected more than 0"),
        (["--seconds", "0"], "--seconds is 0.0; expected more than 0"),
        (["--image-size", "0"], "--image-size is 0; expected more than 0"),
        (["--device", "potato"], "--device is 'potato'; expected cpu, cuda or cuda:1"),
        (["--profile", "dense"], "expected FORM/ENGINE"),
    ],
)
def test_an_impossible_option_is_one_line_at_once(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--net", SMALL.name, "--structure", str(SMALL.structure), *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_a_device_that_is_not_there_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    flags = ["--net", SMALL.name, "--structure", str(SMALL.structure), "--device", "cuda"]
    assert main(["run", *flags]) == 2
    error = capsys.readouterr().err
    assert "--device is 'cuda', but" in error
    assert error.count("\n") == 1


def test_batches_that_are_no_numbers_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--batch", "1,x"])
    assert "'1,x'; expected whole numbers above 0, with commas between" in capsys.readouterr().err
