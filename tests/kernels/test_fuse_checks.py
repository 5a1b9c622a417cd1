"""fuse: what it refuses, and that a wrong network never leaves it."""

from __future__ import annotations

import sys

import nets
import pytest
import torch
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels.errors import DSPBackendError, DSPShapeError, DSPTraceError, DSPVerificationError


def test_a_wrong_program_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse_module = sys.modules["dsp_kernels.fuse"]  # the package's attribute of that name is the function
    right = fuse_module.plan

    def wrong(network: object) -> object:
        program = right(network)
        first = program.steps[0]
        return program.map_tensors(lambda t: t + 1e-2 if t is first.bias else t)

    monkeypatch.setattr(fuse_module, "plan", wrong)
    with pytest.raises(DSPVerificationError, match="differs from the model on the example input"):
        dsp_kernels.fuse(nets.make("residual"), nets.example())


def test_zeros_as_example_hide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse_module = sys.modules["dsp_kernels.fuse"]  # the package's attribute of that name is the function
    right = fuse_module.plan

    def wrong(network: object) -> object:
        program = right(network)
        first = program.steps[0]
        return program.map_tensors(lambda t: t * 1.1 if t is first.weights[0] else t)

    monkeypatch.setattr(fuse_module, "plan", wrong)
    with pytest.raises(DSPVerificationError, match="random images"):
        dsp_kernels.fuse(nets.make("residual"), torch.zeros(1, 3, 8, 8))


def test_is_checked_outside_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        fused = dsp_kernels.fuse(nets.make("residual"), nets.example())
    with torch.no_grad():
        torch.testing.assert_close(
            fused(nets.example()), nets.make("residual")(nets.example()), rtol=1e-4, atol=1e-5
        )


def test_refuses_the_wrong_input() -> None:
    fused = dsp_kernels.fuse(nets.make("residual"), nets.example())
    with pytest.raises(DSPShapeError, match="expected \\(batch, 3, height, width\\)"):
        fused(torch.zeros(1, 4, 8, 8))
    with pytest.raises(DSPShapeError, match="floating dtype"):
        fused(torch.zeros(1, 3, 8, 8, dtype=torch.int64))
    with pytest.raises(DSPShapeError, match="on cpu"):
        fused(torch.zeros(1, 3, 8, 8, device="meta"))


def test_refuses_what_cannot_be_traced_or_run() -> None:
    class Undecided(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(DSPTraceError, match="Undecided cannot be traced"):
        dsp_kernels.fuse(Undecided(), nets.example())
    with pytest.raises(DSPTraceError, match="one input and one output"):
        dsp_kernels.fuse(Pair(), nets.example())
    with pytest.raises(DSPTraceError, match="does not run on an example input of shape \\(2, 5, 8, 8\\)"):
        dsp_kernels.fuse(nets.make("residual"), torch.zeros(2, 5, 8, 8))
    with pytest.raises(DSPBackendError, match="'warp' is unknown"):
        dsp_kernels.fuse(nets.make("residual"), nets.example(), backend="warp")


def test_a_failed_move_changes_nothing() -> None:
    fused = dsp_kernels.fuse(nets.make("residual"), nets.example())
    if fused.backend == "eager":
        pytest.skip("the eager executor runs every dtype")
    fused = dsp_kernels.fuse(nets.make("residual"), nets.example(), backend=fused.backend)
    expected = fused(nets.example())
    with pytest.raises(DSPBackendError):
        fused.double()
    assert torch.equal(fused(nets.example()), expected)
