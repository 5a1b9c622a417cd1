"""Which cases are run; only an engine with the right answer is timed; what the rows say."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dsp_benchmarks.cases import (
    Case,
    accuracy,
    allowed_difference,
    build_case,
    check,
    choose_cases,
    default_cases,
)
from dsp_benchmarks.engines import ENGINES
from dsp_benchmarks.engines.fused import Fused
from dsp_benchmarks.run import run_cases
from dsp_benchmarks.subjects.networks import Labelled, Network, NetworkSource, load_network
from fakes import QUICK, FakeEngine
from ptx.pretended import pretended_gpu
from torch import Tensor

from dsp_kernels.errors import DSPBackendError

X = torch.linspace(-1, 1, 30).view(3, 10)


@pytest.mark.parametrize(
    "engine",
    [lambda x: x + 2e-4, lambda x: torch.full_like(x, float("nan")), lambda x: x[:2]],
    ids=["off", "not-a-number", "another-shape"],
)
def test_a_wrong_answer_has_a_reason(engine: Callable[[Tensor], Tensor]) -> None:
    assert check("broken", engine, X, X, 1e-4)[1].startswith("engine 'broken'")


def test_a_right_answer_passes_with_its_difference() -> None:
    assert check("close", lambda x: x + 5e-5, X, X, 1e-4) == (pytest.approx(5e-5, rel=1e-2), "")


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
    assert {"dense/torch", "packed/torch", "compacted/torch-nhwc", "filters/torch-nhwc"} <= ran
    assert any(name.startswith("packed/fused:") for name in ran)
    (released,) = [row for row in rows if row.form == "released"]
    assert "only a network that the authors released" in released.reason


def test_a_short_plan_builds_slow_engines_once(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ENGINES, "fake", FakeEngine(slow_build=True))
    rows = run_cases(network, [1, 2], [Case("packed", "fake")], QUICK, short=True)
    assert [(row.batch, row.status) for row in rows] == [(1, "skipped"), (2, "ok")]
    assert "for batch 2 only" in rows[0].reason


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
    row, run = build_case(Case("packed", "fake"), network, network.images(1, 0))
    assert run is None
    assert row.reason == "it runs on cuda only, this run is on cpu"


def test_on_a_gpu_images_and_forms_are_moved_and_the_network_stays(
    network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, programs were traced from moved networks with examples on the host."""
    fake = FakeEngine(dtype=torch.float16)
    monkeypatch.setitem(ENGINES, "fake", fake)
    monkeypatch.setattr(network, "labelled", Labelled(network.images(3, 1), torch.tensor([0, 1, 2])))
    with pretended_gpu():
        rows = run_cases(
            network, [2], [Case(form, "fake") for form in ("packed", "filters")], QUICK, device="cuda"
        )
        assert network.example.device == network.form("packed")(network.example).device == torch.device("cpu")
    assert [row.status for row in rows] == ["ok", "ok"]
    assert rows[0].accuracy is not None
    assert set(fake.calls) == {"cuda"}


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


def test_16_bit_and_native_rows_of_a_released_network_have_an_accuracy(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSP_SHARED", str(shared))
    real = load_network(NetworkSource("resnet20_g4"))
    assert real.labelled is not None
    assert len(real.labelled.labels) == 1017
    real.labelled = Labelled(real.labelled.images[:40], real.labelled.labels[:40])
    # In plain PyTorch, so that it runs without the extension too.
    monkeypatch.setitem(ENGINES, "fused:cpu", Fused("fused:cpu", backend="eager"))
    names = ["packed/fused:eager", "packed/openvino-bf16", "packed/torch"]
    names += [f"{form}/fused:cpu" for form in ("packed", "dense", "filters")]
    rows = run_cases(real, [2, 32], choose_cases(engines=names), QUICK)
    counted = {(row.engine, row.batch): row.accuracy for row in rows}
    assert counted["packed/fused:cpu", 2] == counted["packed/fused:cpu", 32]
    with np.load(shared / "golden" / "logits.npz") as golden:
        found = torch.from_numpy(golden["resnet20_g4"][:40]).argmax(1)
    right = float((found == real.labelled.labels).float().mean())
    assert counted["packed/fused:cpu", 32] == pytest.approx(right, abs=1e-6)
    half = counted["packed/openvino-bf16", 32]
    assert half is None or abs(half - right) <= 0.026  # bfloat16 may change a close decision
    assert counted["packed/torch", 32] is None  # the reference itself
    assert counted["packed/fused:eager", 32] is None  # not counted: slow, and as exact as the native one
    assert counted["dense/fused:cpu", 32] == pytest.approx(right, abs=1e-6)  # the packed weights and zeros
    assert counted["filters/fused:cpu", 32] is None  # random weights
