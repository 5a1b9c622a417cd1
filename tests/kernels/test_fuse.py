"""fuse: the same answers as the model, from a Program in which everything is folded."""

from __future__ import annotations

import copy
import pickle
import sys
import threading

import nets
import pytest
import torch
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels.errors import DSPBackendError, DSPShapeError, DSPTraceError, DSPVerificationError
from dsp_kernels.executors import EXECUTORS
from dsp_kernels.native import native
from dsp_kernels.planner import plan
from dsp_kernels.program import ConvStep, TorchStep
from dsp_kernels.trace import trace

# tests/native fails where the native one could be there and is not.
ON_A_CPU = [
    name
    for name in EXECUTORS.names()
    if name not in ("cuda", "triton") and (name != "cpu" or native() is not None)
]


def example(batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


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
    fused = dsp_kernels.fuse(model, example(2, torch.float64))
    x = example(batch, torch.float64, seed=batch)
    with torch.no_grad():
        expected = model(x)
    assert fused(x).shape == expected.shape
    torch.testing.assert_close(fused(x), expected, rtol=0, atol=1e-12)


def test_folds_everything_of_a_residual_network() -> None:
    program = dsp_kernels.fuse(nets.make("residual"), example()).program
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
    fused = dsp_kernels.fuse(nets.make("branching"), example())
    text = fused.explain()
    assert "padding mode 'reflect'" in text
    assert "plain PyTorch: mul" in text
    steps = [step for step in fused.program.steps if isinstance(step, TorchStep)]
    assert f"{len(steps)} of them plain PyTorch" in text
    assert "mul" in {getattr(step.target, "__name__", "") for step in steps}
    assert "concat" in text
    assert len(text.splitlines()) == 1 + len(fused.program.steps)


def test_values_are_freed_after_their_last_reader() -> None:
    program = plan(trace(nets.make("residual"), example()))
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
    fused = dsp_kernels.fuse(model, example())
    assert model.training
    assert not model.packed.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    before = fused(example())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fused(example()), before)


def test_input_is_not_written() -> None:
    for name in nets.NAMES:
        fused = dsp_kernels.fuse(nets.make(name), example())
        for x in (example(), example().contiguous(memory_format=torch.channels_last)):
            before = x.clone()
            fused(x)
            assert torch.equal(x, before)


@pytest.mark.parametrize("name", nets.NAMES)
def test_copies_and_moves(name: str) -> None:
    fused = dsp_kernels.fuse(nets.make(name), example())
    expected = fused(example())
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(other(example()), expected)
    wide = copy.deepcopy(fused).double()
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide(example()), expected, rtol=1e-4, atol=1e-5)
    assert fused.dtype == torch.float32


def test_half_precision_inside_float_outside() -> None:
    model = nets.make("residual")
    fused = dsp_kernels.fuse(model, example(), dtype=torch.bfloat16)
    y = fused(example())
    assert y.dtype == torch.float32
    step = fused.program.steps[0]
    assert isinstance(step, ConvStep)
    assert step.weights[0].dtype == torch.bfloat16
    with torch.no_grad():
        error = (y - model(example())).abs().max()
    assert 0 < error < 0.1


def test_always_evaluates() -> None:
    fused = dsp_kernels.fuse(nets.make("pre-activation"), example())
    nn.Sequential(fused).train()
    assert not fused.training
    assert torch.equal(fused(example()), fused(example()))


def test_is_safe_for_threads() -> None:
    fused = dsp_kernels.fuse(nets.make("residual"), example())
    inputs = [example(batch, seed=batch) for batch in range(1, 9)]
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


def test_a_wrong_program_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse_module = sys.modules["dsp_kernels.fuse"]  # the package's attribute of that name is the function
    right = fuse_module.plan

    def wrong(network: object) -> object:
        program = right(network)
        first = program.steps[0]
        return program.map_tensors(lambda t: t + 1e-2 if t is first.bias else t)

    monkeypatch.setattr(fuse_module, "plan", wrong)
    with pytest.raises(DSPVerificationError, match="differs from the model on the example input"):
        dsp_kernels.fuse(nets.make("residual"), example())


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


def test_refuses_the_wrong_input() -> None:
    fused = dsp_kernels.fuse(nets.make("residual"), example())
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
        dsp_kernels.fuse(Undecided(), example())
    with pytest.raises(DSPTraceError, match="one input and one output"):
        dsp_kernels.fuse(Pair(), example())
    with pytest.raises(DSPTraceError, match="does not run on an example input of shape \\(2, 5, 8, 8\\)"):
        dsp_kernels.fuse(nets.make("residual"), torch.zeros(2, 5, 8, 8))
    with pytest.raises(DSPBackendError, match="'warp' is unknown"):
        dsp_kernels.fuse(nets.make("residual"), example(), backend="warp")


def test_every_executor_gives_the_same_answer() -> None:
    model = nets.make("residual")
    expected = dsp_kernels.fuse(model, example(), backend="eager")(example())
    for name in ON_A_CPU:
        fused = dsp_kernels.fuse(model, example(), backend=name)
        torch.testing.assert_close(fused(example()), expected, rtol=1e-4, atol=1e-5)


def test_large_batches_go_through_in_parts() -> None:
    """More images than one part holds, and a last part that is smaller."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 24 * 24, 2))
    model = nets.settled(model.double())
    x = torch.randn(75, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fused = dsp_kernels.fuse(model, x[:1], backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-12)


def test_is_checked_outside_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        fused = dsp_kernels.fuse(nets.make("residual"), example())
    with torch.no_grad():
        torch.testing.assert_close(fused(example()), nets.make("residual")(example()), rtol=1e-4, atol=1e-5)


def test_can_be_traced_compiled_and_exported() -> None:
    """Whoever records operations sees PyTorch's own."""
    model, x = nets.make("residual"), example(seed=3)
    fused = dsp_kernels.fuse(model, example())
    with torch.no_grad():
        expected = model(x)
        for recorded in (
            torch.jit.trace(fused, example(), check_trace=False),
            torch.compile(fused, fullgraph=True),
            torch.export.export(fused, (example(),)).module(),
        ):
            torch.testing.assert_close(recorded(x), expected, rtol=1e-4, atol=1e-5)


def test_runs_under_another_default_dtype() -> None:
    fused, x = dsp_kernels.fuse(nets.make("residual"), example()), example()
    expected = fused(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fused(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_failed_move_changes_nothing() -> None:
    fused = dsp_kernels.fuse(nets.make("residual"), example())
    if fused.backend == "eager":
        pytest.skip("the eager executor runs every dtype")
    fused = dsp_kernels.fuse(nets.make("residual"), example(), backend=fused.backend)
    expected = fused(example())
    with pytest.raises(DSPBackendError):
        fused.double()
    assert torch.equal(fused(example()), expected)


def test_a_single_packed_conv_can_be_fused() -> None:
    conv = dsp_kernels.PackedConv2d(nets.MIXED, 3, padding=1).eval()
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(dsp_kernels.fuse(conv, x)(x), conv(x), rtol=1e-4, atol=1e-5)


class _WritesAfterReading(nn.Module):
    """A convolution reads a tensor that is changed in place before the result is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        read = self.second(hidden)
        hidden.mul_(2)
        return self.norm(read) + hidden


def test_a_convolution_is_not_moved_behind_a_write() -> None:
    model = nets.settled(_WritesAfterReading())
    for name in ON_A_CPU:
        fused = dsp_kernels.fuse(model, example(), backend=name)
        torch.testing.assert_close(fused(example(seed=2)), model(example(seed=2)), rtol=1e-4, atol=1e-5)


def test_plain_modules_are_kept_in_eval_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.RReLU(0.1, 0.9), nn.Dropout3d(0.9)).train()
    fused = dsp_kernels.fuse(model, example())
    model.eval()
    torch.testing.assert_close(fused(example()), model(example()), rtol=1e-4, atol=1e-5)


class _Offset(nn.Module):
    """A parameter that has, for one image, the shape of what it is added to; pools of unchanged size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8)
        self.offset = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.pool = nn.AdaptiveAvgPool2d((None, None))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x) + self.offset)


class _Aliased(nn.Module):
    """An operation in place on another name of a tensor, and one on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.relu, self.conv = nn.Identity(), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        y = self.conv(x)
        z = self.relu(self.same(y))
        return self.conv(z) + y


@pytest.mark.parametrize("model", [_Offset(), _Aliased()], ids=["offset", "aliased"])
def test_one_example_image_stands_for_any(model: nn.Module) -> None:
    given = example(1)
    before = given.clone()
    for name in ON_A_CPU:
        fused = dsp_kernels.fuse(model.eval(), given, backend=name)
        assert torch.equal(given, before)
        for x in (example(5, seed=5), torch.randn(2, 3, 12, 12)):
            with torch.no_grad():
                torch.testing.assert_close(fused(x.clone()), model(x.clone()), rtol=1e-4, atol=1e-5)
