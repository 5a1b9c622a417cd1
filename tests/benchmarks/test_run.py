"""Correct first, timed second: the gate, the engines and the result file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dsp_benchmarks.__main__ import main
from dsp_benchmarks.engines import ENGINES, released
from dsp_benchmarks.released_form import ReleasedNetwork, read_arrays
from dsp_benchmarks.report import cells
from dsp_benchmarks.run import Row, bench_released, check, time_runners
from dsp_benchmarks.timing import Samples
from torch import Tensor

from dsp_kernels.errors import DSPBackendError, DSPFormatError, DSPShapeError, DSPVerificationError
from dsp_pruning.data import load_cifar10_subset, normalise

X = torch.linspace(-1, 1, 30).view(3, 10)


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
        time_runners({"right": right, "broken": engine}, X, X, rounds=1)
    assert calls == ["right"]  # checked, never timed


def test_a_right_engine_passes_with_its_difference() -> None:
    assert check("close", lambda x: x + 5e-5, X, X) == pytest.approx(5e-5, rel=1e-2)


def test_another_network_may_be_shown_unchecked() -> None:
    rows = time_runners({"same": lambda x: x, "other": _wrong}, X, X, unchecked=("other",), rounds=2)
    assert [(row.engine, row.batch, row.difference) for row in rows] == [("same", 3, 0.0), ("other", 3, None)]


@pytest.mark.parametrize("name", ["resnet20_g2", "resnet20_g3", "resnet20_g4", "resnet56_g4"])
def test_the_released_form_gives_the_golden_logits(shared: Path, name: str) -> None:
    network = ReleasedNetwork(*read_arrays(shared / "nets" / f"{name}.npz"))
    data = load_cifar10_subset(shared / "data" / "cifar10_subset.npz")
    x = normalise(data.test.images[:8], data.mean, data.std)
    with np.load(shared / "golden" / "logits.npz") as golden:
        expected = torch.from_numpy(golden[name][:8])
    with torch.inference_mode():
        assert float((network(x) - expected).abs().max()) <= 2e-5
    run = ENGINES["released"].prepare(network, x)
    assert check("released", run, x, expected, 2e-5) <= 2e-5


def test_the_released_engine_runs_only_the_released_form() -> None:
    with pytest.raises(DSPShapeError, match="runs a ReleasedNetwork, not Identity"):
        released.prepare(torch.nn.Identity(), X)


def test_an_unknown_engine_is_an_error(shared: Path) -> None:
    with pytest.raises(DSPBackendError, match="unknown engine 'warp'; known are released, packed, fused"):
        bench_released(shared / "nets" / "resnet20_g4.npz", [1], ["warp"])


def test_an_engine_that_cannot_run_says_why(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(released, "available", lambda: (False, "no TorchScript"))
    with pytest.raises(DSPBackendError, match="'released' cannot run here: no TorchScript"):
        bench_released(shared / "nets" / "resnet20_g4.npz", [1])


def test_a_released_network_runs_in_every_engine(
    shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nets, out = str(shared / "nets"), tmp_path / "result.json"
    flags = ["--net", "resnet20_g4", "--nets", nets, "--batch", "2", "--rounds", "2", "--out", str(out)]
    assert main(["run", *flags]) == 0
    assert "fused" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [row["engine"] for row in result["rows"]] == list(ENGINES)
    assert all(row["max_logit_difference"] <= 1e-4 for row in result["rows"])
    assert all(len(row["seconds"]) == row["n"] == 2 for row in result["rows"])
    assert result["environment"]["torch"] == torch.__version__
    assert result["net"] == "resnet20_g4"


def test_a_missing_or_foreign_net_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--net", str(tmp_path / "none.npz")]) == 1
    assert "none.npz: no such file" in capsys.readouterr().err
    (tmp_path / "text.npz").write_text("text")
    assert main(["run", "--net", str(tmp_path / "text.npz")]) == 1
    error = capsys.readouterr().err
    assert "is not a released network" in error
    assert error.count("\n") == 1


def test_arrays_that_are_not_a_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    with pytest.raises(DSPFormatError, match="is not a released network"):
        read_arrays(tmp_path / "other.npz")


def test_cells_compare_with_the_first_engine_of_the_same_batch() -> None:
    rows = [
        Row("a", 1, Samples((0.004,)), 0.0),
        Row("b", 1, Samples((0.001,)), None),
        Row("a", 8, Samples((0.01,)), 0.0),
        Row("b", 8, Samples((0.02,)), 1e-6),
    ]
    lines = cells(rows)
    assert [line[6] for line in lines] == ["1.00", "4.00", "1.00", "0.50"]
    assert [line[2] for line in lines] == ["4.00", "1.00", "10.00", "20.00"]
    assert [line[7] for line in lines] == ["0.0e+00", "not compared", "0.0e+00", "1.0e-06"]
