"""``run`` as a command: a result file, an exit status, and errors of one line."""

from pathlib import Path

import numpy as np
import pytest
import torch
from dsp_benchmarks import cli
from dsp_benchmarks.cli import main
from dsp_benchmarks.engines import ENGINES
from dsp_benchmarks.measure.peaks import Peaks
from dsp_benchmarks.report.results import read_result
from dsp_benchmarks.report.tables import summary
from fakes import SMALL, FakeEngine

SMALL_FLAGS = ["--net", SMALL.name, "--structure", str(SMALL.structure)]


@pytest.fixture
def known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring them takes seconds."""
    monkeypatch.setattr(cli, "measure_peaks", lambda *_: Peaks({"float32": 1e11}, 1e10))


@pytest.mark.usefixtures("known_peaks")
def test_a_released_network_through_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is not found, one is generated, and the file and the README's table say so."""
    monkeypatch.setenv("DSP_SHARED", str(tmp_path))
    monkeypatch.setenv("DSP_KERNELS_CACHE", str(tmp_path))
    out = tmp_path / "result.json"
    flags = ["--net", "resnet20_g4", "--batch", "2", "--rounds", "2", "--out", str(out)]
    # A list may have commas, and an option may be repeated.
    flags += ["--engines", "torch,torchscript", "--engine", "fused:eager", "--forms", "released,packed"]
    assert main(["run", *flags]) == 0
    assert "packed/fused:eager" in capsys.readouterr().out
    (run,) = read_result(out).runs
    assert run.flop_ratio == pytest.approx(2.664, rel=2e-3)  # as published
    assert run.name == "resnet20_g4 (generated)"
    assert "resnet20_g4 (generated) |" in summary(read_result(out))
    assert [row.engine for row in run.rows if row.status == "ok"] == [
        f"{form}/{engine}"
        for form in ("released", "packed")
        for engine in ("torch", "torchscript", "fused:eager")
    ]
    assert all(row.difference is not None and row.difference <= 2e-5 for row in run.rows)
    assert all(row.floor and row.build_seconds for row in run.rows)
    about = read_result(out).environment
    assert (about["torch"], bool(about["commit"])) == (torch.__version__, True)


@pytest.mark.usefixtures("known_peaks")
def test_a_wrong_engine_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ENGINES, "fake", FakeEngine(error=0.5))
    flags = [
        "--image-size",
        "16",
        "--batch",
        "1,2",
        "--engine",
        "packed/fake,packed/tensorrt",
        "--rounds",
        "1",
    ]
    assert main(["run", *SMALL_FLAGS, *flags, "--out", str(tmp_path / "a.json")]) == 1
    shown = capsys.readouterr()
    assert "error: packed/fake, batch 1: engine 'packed/fake' is off by" in shown.err
    assert "\nunavailable, it runs on cuda only, this run is on cpu: packed/tensorrt\n" in shown.out
    assert shown.out.count("packed/tensorrt") == 1


def _error_of(capsys: pytest.CaptureFixture[str], flags: list[str]) -> str:
    """Of a command that fails with one line."""
    assert main(["run", *flags]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("none.npz", "none.npz"),
        ("text.npz", "not an .npz file of a released network"),
        ("other.npz", "not an .npz file of a released network"),
        ("resnet19", "is unknown"),
        ("resnet18", "is not pruned: give a structure"),
    ],
)
def test_a_network_that_does_not_exist_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    (tmp_path / "text.npz").write_text("text")
    np.savez(tmp_path / "other.npz", weight=np.zeros(3))
    net = str(tmp_path / name) if name.endswith(".npz") else name
    assert words in _error_of(capsys, ["--net", net])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rounds", "0"], "--rounds is 0; expected more than 0"),
        (["--image-size", "0"], "--image-size is 0; expected more than 0"),
        (["--device", "potato"], "--device is 'potato'; expected cpu, cuda or cuda:1"),
        (["--device", "cuda:256"], "--device is 'cuda:256'; expected cpu, cuda or cuda:1"),
        (["--device", "cpu:1"], "--device is 'cpu:1'; expected cpu, cuda or cuda:1"),
        (["--device", "meta"], "--device is 'meta'; expected cpu, cuda or cuda:1"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used"),
        (["--profile", "dense"], "expected FORM/ENGINE"),
    ],
)
def test_an_impossible_option_is_an_error(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in _error_of(capsys, [*SMALL_FLAGS, *flags])


def test_batch_sizes_that_are_not_numbers_are_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--batch", "1,x"])
    assert "'1,x'; expected whole numbers above 0, with commas between" in capsys.readouterr().err
