"""fuse: the same answers as the model, from a Program in which everything is folded."""

from __future__ import annotations

import copy
import pickle
import threading

import nets
import pytest
import torch
from torch import nn

import dsp_kernels
from dsp_kernels.graph.network import trace
from dsp_kernels.program.planner import plan
from dsp_kernels.program.steps import ConvStep, TorchStep


@pytest.mark.parametrize(
    ("name", "batch"),
    # pre-activation's own view(x.size(0), -1) is impossible for an empty batch
    [
        (name, batch)
        for name in nets.NAMES
        for batch in (0, 1, 3, 17)
        if (name, batch) != ("pre-activation", 0)
    ],
)
def test_equals_the_model_at_any_batch(name: str, batch: int) -> None:
    model = nets.make(name).double()
    fused = dsp_kernels.fuse(model, nets.example(2, torch.float64))
    x = nets.example(batch, torch.float64, seed=batch)
    with torch.no_grad():
        expected = model(x)
    assert fused(x).shape == expected.shape
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-12)


def test_folds_everything_of_a_residual_network() -> None:
    program = dsp_kernels.fuse(nets.make("residual"), nets.example()).program
    kinds = [type(step).__name__ for step in program.steps]
    assert kinds == ["ConvStep"] * 5 + ["PoolStep", "GlobalPoolStep", "LinearStep"]
    convs = [step for step in program.steps if isinstance(step, ConvStep)]
    assert [step.spec.activation for step in convs] == ["relu", "relu", "relu", "none", "relu"]
    assert sum(len(step.inputs) == 2 for step in convs) == 2  # both residuals are folded
    assert program.macs == sum(
        (3 * 6 * 9 + 3 * 3 * 9 + 9 + 4 * 2 * 9 + 6 * 8) * 64 * (i == 0)
        + (3 * 3 * 9 + 9 + 4 * 2 * 9 + 6 * 8) * 16 * (i == 1)
        + 40 * (i == 2)
        for i in range(3)
    )


def test_says_what_stays_plain_pytorch() -> None:
    fused = dsp_kernels.fuse(nets.make("branching"), nets.example())
    text = fused.explain()
    assert "padding mode 'reflect'" in text
    assert "plain PyTorch: mul" in text
    steps = [step for step in fused.program.steps if isinstance(step, TorchStep)]
    assert f"{len(steps)} of them plain PyTorch" in text
    assert "mul" in {getattr(step.target, "__name__", "") for step in steps}
    assert "concat" in text
    assert len(text.splitlines()) == 1 + len(fused.program.steps)


def test_values_are_freed_after_their_last_reader() -> None:
    program = plan(trace(nets.make("residual"), nets.example()))
    alive: set[str] = {program.input}
    most = 0
    for step, dead in zip(program.steps, program.dying, strict=True):
        assert set(step.inputs) <= alive
        alive.add(step.output)
        most = max(most, len(alive))
        alive -= set(dead)
    assert alive == {program.output}
    assert most == 3


def test_leaves_the_model_alone() -> None:
    model = nets.make("residual").train()
    model.packed.eval()
    state = copy.deepcopy(model.state_dict())
    fused = dsp_kernels.fuse(model, nets.example())
    assert model.training
    assert not model.packed.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    before = fused(nets.example())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fused(nets.example()), before)


def test_input_is_not_written() -> None:
    for name in nets.NAMES:
        fused = dsp_kernels.fuse(nets.make(name), nets.example())
        for x in (nets.example(), nets.example().contiguous(memory_format=torch.channels_last)):
            before = x.clone()
            fused(x)
            assert torch.equal(x, before)


@pytest.mark.parametrize("name", nets.NAMES)
def test_copies_and_moves(name: str) -> None:
    fused = dsp_kernels.fuse(nets.make(name), nets.example())
    expected = fused(nets.example())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(other(nets.example()), expected)
    wide = copy.deepcopy(fused).double()
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide(nets.example()), expected, rtol=1e-4, atol=1e-5)
    assert fused.dtype == torch.float32


def test_half_precision_inside_float_outside() -> None:
    model = nets.make("residual")
    fused = dsp_kernels.fuse(model, nets.example(), dtype=torch.bfloat16)
    y = fused(nets.example())
    assert y.dtype == torch.float32
    step = fused.program.steps[0]
    assert isinstance(step, ConvStep)
    assert step.weights[0].dtype == torch.bfloat16
    with torch.no_grad():
        error = (y - model(nets.example())).abs().max()
    assert 0 < error < 0.1


def test_always_evaluates() -> None:
    fused = dsp_kernels.fuse(nets.make("pre-activation"), nets.example())
    nn.Sequential(fused).train()
    assert not fused.training
    assert torch.equal(fused(nets.example()), fused(nets.example()))


def test_is_safe_for_threads() -> None:
    fused = dsp_kernels.fuse(nets.make("residual"), nets.example())
    inputs = [nets.example(batch, seed=batch) for batch in range(1, 9)]
    expected = [fused(x) for x in inputs]
    fresh = copy.deepcopy(fused)
    wrong: list[int] = []

    def work(number: int) -> None:
        wrong.extend(number for _ in range(20) if not torch.equal(fresh(inputs[number]), expected[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_every_executor_gives_the_same_answer() -> None:
    model = nets.make("residual")
    expected = dsp_kernels.fuse(model, nets.example(), backend="eager")(nets.example())
    for name in nets.ON_A_CPU:
        fused = dsp_kernels.fuse(model, nets.example(), backend=name)
        torch.testing.assert_close(fused(nets.example()), expected, rtol=1e-4, atol=1e-5)


def test_large_batches_go_through_in_parts() -> None:
    """More images than one part holds, and a last part that is smaller."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 24 * 24, 2))
    model = nets.settled(model.double())
    x = torch.randn(75, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fused = dsp_kernels.fuse(model, x[:1], backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-12)


def test_runs_under_another_default_dtype() -> None:
    fused, x = dsp_kernels.fuse(nets.make("residual"), nets.example()), nets.example()
    expected = fused(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fused(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)
