"""Rows of 16-bit engines show how many images they classify correctly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from dsp_benchmarks.cases import Case, build_case, case_input, choose_cases
from dsp_benchmarks.engines import ENGINES
from dsp_benchmarks.engines.fused import Fused
from dsp_benchmarks.measure.accuracy import Labelled, accuracy
from dsp_benchmarks.run import run_cases
from dsp_benchmarks.subjects.networks import Network, NetworkSource, load_network
from fakes import QUICK
from torch import Tensor


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
    names = "packed/fused:cpu packed/fused:eager packed/openvino-bf16 packed/torch dense/fused:cpu"
    rows = run_cases(real, [2, 32], choose_cases(engines=names.split()), QUICK)
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
    assert counted["dense/fused:cpu", 32] is None  # random weights


def test_the_native_16_bit_engine_is_available_or_gives_its_reason(network: Network) -> None:
    able, reason = ENGINES["fused:cpu:bf16"].available()
    row, _ = build_case(Case("packed", "fused:cpu:bf16"), network, case_input(network, 1, 0))
    assert row.status == ("ok" if able else "unavailable"), row.reason
    assert able or reason == row.reason != ""
