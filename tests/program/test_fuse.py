"""fuse: the same answers as the model, also under tracers and dispatch modes, and everything folded."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

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
    steps = [step for step in fused.program.steps if isinstance(step, TorchStep)]
    assert f"{len(steps)} of them plain PyTorch" in text
    assert len(text.splitlines()) == 1 + len(fused.program.steps)


def test_tensors_are_freed_after_their_last_reader() -> None:
    program = dsp_kernels.fuse(nets.make("residual"), nets.example()).program
    alive, most = set(program.inputs), 0
    for step, dead in zip(program.steps, program.dying, strict=True):
        assert alive.issuperset(step.inputs)
        alive.add(step.output)
        most = max(most, len(alive))
        alive -= set(dead)
    assert (alive, most) == (set(program.outputs), 3)


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


def _cut(cut: Callable[[Tensor], Tensor], width: int = 8) -> nn.Module:
    """Indexing between two convolutions; there are as many columns as channels."""
    return nn.Sequential(nets.ConvThen(lambda y: cut(y.relu()).relu(), 8), nn.Conv2d(width, 4, 1))


UNUSUAL: dict[str, Callable[[], nn.Module]] = {
    "parameter of the shape of an image": _Offset,
    "writes through an alias": _Aliased,
    "write in place after a convolution": lambda: nets.settled(_WritesAfterReading()),
    "random in training mode": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.RReLU(0.1, 0.9), nn.Dropout3d(0.9)
    ),
    "inner columns": lambda: _cut(lambda y: y[..., 1:-1]),
    "first columns": lambda: _cut(lambda y: y[..., :6]),
    "last columns": lambda: _cut(lambda y: y[:, ..., 2:]),
    "channels from the end": lambda: _cut(lambda y: y[..., 1:4, :, :], 3),
    "channels": lambda: _cut(lambda y: y[:, 1:4, ...], 3),
}


@pytest.mark.parametrize("backend", nets.ON_A_CPU)
@pytest.mark.parametrize("name", UNUSUAL)
def test_one_example_image_stands_for_all(name: str, backend: str) -> None:
    torch.manual_seed(0)
    model, given = UNUSUAL[name]().train(), nets.example(1)
    fused = dsp_kernels.fuse(model, given, backend=backend)
    assert torch.equal(given, nets.example(1))
    model.eval()
    for x in (nets.example(5, seed=5), torch.randn(2, 3, 12, 12)):
        with torch.no_grad():
            assert_close(fused(x.clone()), model(x.clone()))


def test_it_can_be_traced_compiled_and_exported() -> None:
    model, x = nets.make("residual"), nets.example(seed=3)
    fused = dsp_kernels.fuse(model, nets.example())
    with torch.no_grad():
        expected = model(x)
        for recorded in (
            torch.jit.trace(fused, nets.example(), check_trace=False),
            torch.compile(fused, fullgraph=True),
            torch.export.export(fused, (nets.example(),)).module(),
        ):
            torch.testing.assert_close(recorded(x), expected, rtol=1e-4, atol=1e-5)


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.append(str(func))
        return func(*args, **kwargs or {})


@pytest.fixture(params=nets.ON_A_CPU)
def fused(request: pytest.FixtureRequest) -> dsp_kernels.FusedNetwork:
    return dsp_kernels.fuse(nets.make("residual"), nets.example(), backend=request.param)


def test_a_dispatch_mode_sees_every_operation(fused: dsp_kernels.FusedNetwork) -> None:
    x = nets.example()
    expected = fused(x)
    with _Names() as names:
        seen = fused(x)
    assert sum("convolution" in op for op in names.seen) >= 5
    assert any("addmm" in op or "linear" in op for op in names.seen)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(fused(x), expected)  # afterwards the backend runs again


@pytest.mark.parametrize("name", nets.ON_A_CPU)
def test_operations_of_a_fused_network_can_be_counted(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)).eval()
    fused = dsp_kernels.fuse(model, nets.example(), backend=name)
    with FlopCounterMode(display=False) as counter:
        fused(nets.example(3))
    assert counter.get_total_flops() == 3 * 2 * fused.program.macs


def test_fake_tensors_give_the_output_shape(fused: dsp_kernels.FusedNetwork) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        answers: list[Tensor] = [fused(torch.empty(7, 3, 8, 8)), fused(mode.from_tensor(nets.example(7)))]
    assert [type(answer).__name__ for answer in answers] == ["FakeTensor"] * 2
    assert [tuple(answer.shape) for answer in answers] == [(7, 5)] * 2


def test_one_recorder_does_not_affect_the_next(fused: dsp_kernels.FusedNetwork) -> None:
    """What is prepared under one recorder is kept for later calls."""
    x = nets.example()
    expected = fused(x)
    fresh = copy.deepcopy(fused)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fresh(torch.empty(2, 3, 8, 8))
    with _Names() as first:
        seen = fresh(x)
    with _Names() as again:
        fresh(x)
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-5)
    assert first.seen == again.seen
    assert torch.equal(fresh(x), expected)
