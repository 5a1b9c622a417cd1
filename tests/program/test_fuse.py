"""fuse: the same answers as the model, and everything folded that can be."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import nets
import pytest
import torch
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels.program.steps import ConvStep, TorchStep

# pre-activation's own view(x.size(0), -1) is impossible for an empty batch
SIZES = [(name, batch) for name in nets.NAMES for batch in (0, 1, 3, 17)]
SIZES.remove(("pre-activation", 0))


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "batch"), SIZES)
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
    groups = (3 * 3 + 1 + 4 * 2) * 9
    assert program.macs == (3 * 6 * 9 + groups + 8 * 6) * 64 + (groups + 6 * 8) * 16 + 8 * 5


def test_explain_says_what_stays_plain_pytorch() -> None:
    fused = dsp_kernels.fuse(nets.make("branching"), nets.example())
    text = fused.explain()
    assert "padding mode 'reflect'" in text
    assert "plain PyTorch: mul" in text
    steps = [step for step in fused.program.steps if isinstance(step, TorchStep)]
    assert f"{len(steps)} of them plain PyTorch" in text
    assert len(text.splitlines()) == 1 + len(fused.program.steps)


def test_tensors_are_freed_after_their_last_reader() -> None:
    program = dsp_kernels.fuse(nets.make("residual"), nets.example()).program
    alive, most = {program.input}, 0
    for step, dead in zip(program.steps, program.dying, strict=True):
        assert alive.issuperset(step.inputs)
        alive.add(step.output)
        most = max(most, len(alive))
        alive -= set(dead)
    assert (alive, most) == ({program.output}, 3)


def test_the_model_is_not_changed() -> None:
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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", nets.NAMES)
def test_the_input_is_not_written(name: str, layout: torch.memory_format) -> None:
    x = nets.example().contiguous(memory_format=layout)
    dsp_kernels.fuse(nets.make(name), nets.example())(x)
    assert torch.equal(x, nets.example())


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


def test_bfloat16_inside_and_float32_outside() -> None:
    model, x = nets.make("residual"), nets.example()
    fused = dsp_kernels.fuse(model, x, dtype=torch.bfloat16)
    assert "torch.bfloat16" in fused.explain()
    with torch.no_grad():
        y, error = fused(x), (fused(x) - model(x)).abs().max()
    assert y.dtype == torch.float32
    assert 0 < error < 0.1


def test_it_stays_in_eval_mode() -> None:
    fused = dsp_kernels.fuse(nets.make("pre-activation"), nets.example())
    nn.Sequential(fused).train()
    assert not fused.training
    assert torch.equal(fused(nets.example()), fused(nets.example()))


def test_threads_may_share_it() -> None:
    fused = dsp_kernels.fuse(nets.make("residual"), nets.example())
    inputs = [nets.example(batch, seed=batch) for batch in range(1, 9)]
    expected = [fused(x) for x in inputs]
    fresh = copy.deepcopy(fused)
    with ThreadPoolExecutor(8) as threads:
        for _ in range(20):
            for got, right in zip(threads.map(fresh, inputs), expected, strict=True):
                assert torch.equal(got, right)


def test_a_large_batch_runs_in_parts() -> None:
    """The last part is smaller."""
    model = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 24 * 24, 2))
    model = nets.settled(model.double())
    x = torch.randn(75, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fused = dsp_kernels.fuse(model, x[:1], backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=0, atol=1e-12)


def test_another_default_dtype_changes_nothing() -> None:
    fused, x = dsp_kernels.fuse(nets.make("residual"), nets.example()), nets.example()
    expected = fused(x)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(fused(x), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_single_packed_conv_can_be_fused() -> None:
    conv = dsp_kernels.PackedConv2d(nets.MIXED, 3, padding=1).eval()
    x = torch.randn(2, 6, 5, 5)
    assert_close(dsp_kernels.fuse(conv, x)(x), conv(x))


class _WritesAfterReading(nn.Module):
    """A convolution reads a tensor that is changed in place before its output is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        read = self.second(hidden)
        hidden.mul_(2)
        return self.norm(read) + hidden


def test_a_convolution_stays_before_a_write_in_place() -> None:
    model = nets.settled(_WritesAfterReading())
    for name in nets.ON_A_CPU:
        fused = dsp_kernels.fuse(model, nets.example(), backend=name)
        assert_close(fused(nets.example(seed=2)), model(nets.example(seed=2)))


def test_plain_modules_are_kept_in_eval_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.RReLU(0.1, 0.9), nn.Dropout3d(0.9)).train()
    fused = dsp_kernels.fuse(model, nets.example())
    model.eval()
    assert_close(fused(nets.example()), model(nets.example()))


class _Offset(nn.Module):
    """For one image, the parameter has the shape of what it is added to."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8)
        self.offset = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.pool = nn.AdaptiveAvgPool2d((None, None))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x) + self.offset)


class _Aliased(nn.Module):
    """Writes in place through an alias, and into the input."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.relu, self.conv = nn.Identity(), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        y = self.conv(x)
        z = self.relu(self.same(y))
        return self.conv(z) + y


@pytest.mark.parametrize("model", [_Offset(), _Aliased()], ids=["offset", "aliased"])
def test_one_example_image_stands_for_all(model: nn.Module) -> None:
    given = nets.example(1)
    before = given.clone()
    for name in nets.ON_A_CPU:
        fused = dsp_kernels.fuse(model.eval(), given, backend=name)
        assert torch.equal(given, before)
        for x in (nets.example(5, seed=5), torch.randn(2, 3, 12, 12)):
            with torch.no_grad():
                assert_close(fused(x.clone()), model(x.clone()))


class _Cut(nn.Module):
    """Indexing between two convolutions; there are as many columns as channels."""

    def __init__(self, cut: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.cut = cut
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(self.first(x).relu()).relu())


@pytest.mark.parametrize(
    ("cut", "width"),
    [
        (lambda y: y[..., 1:-1], 8),
        (lambda y: y[..., :6], 8),
        (lambda y: y[:, ..., 2:], 8),
        (lambda y: y[..., 1:4, :, :], 3),
        (lambda y: y[:, 1:4, ...], 3),
    ],
    ids=["inner columns", "first columns", "last columns", "channels from the end", "channels"],
)
def test_indexing_with_an_ellipsis(cut: Callable[[Tensor], Tensor], width: int) -> None:
    torch.manual_seed(0)
    model = _Cut(cut, width).eval()
    for name in nets.ON_A_CPU:
        fused = dsp_kernels.fuse(model, nets.example(), backend=name)
        with torch.no_grad():
            assert_close(fused(nets.example(3)), model(nets.example(3)))
