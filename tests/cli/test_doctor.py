"""``dsp doctor``: a report that shows what cannot run and why, and fails if something is wrong."""

import re
from types import SimpleNamespace

import pytest
import torch

from dsp_cli import doctor
from dsp_cli.main import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is present")
def test_the_report_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 60
    found = {line[:16].strip(): line[17:] for line in lines}
    assert found["torch"].startswith(torch.__version__.split("+")[0])
    assert "cuda kernels" in found
    assert "nvidia-smi" in found["gpu"]
    assert found["conv, triton"].startswith("cannot run: ")
    assert found["conv, eager"].startswith("right, ")
    assert re.match(r"fused [\d.]+ ms, dense [\d.]+ ms", lines[-1])


def test_backends_that_are_wrong_or_break_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(x: torch.Tensor, residual: None) -> torch.Tensor:
        raise RuntimeError("no launch")

    def backend(name: str, plan: object) -> SimpleNamespace:
        return SimpleNamespace(name=name, can_run=lambda *_: (True, ""), prepare=lambda *_: plan)

    zeros = backend("zeros", lambda x, residual: torch.zeros(8, 24, 14, 14))
    monkeypatch.setattr(doctor, "BACKENDS", [zeros, backend("breaks", breaks)])
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"conv, zeros +WRONG", shown)
    assert re.search(r"conv, breaks +FAILED: RuntimeError: no launch", shown)
