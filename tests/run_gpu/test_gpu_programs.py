"""The GPU executor on the CPU: layouts, the memory plan, residuals in place, runs per input shape.

PyTorch stands in for the kernels, behind their interface, and checks their operands.
"""

import gc
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from cases import definition
from ptx.pretended import pretended_gpu
from torch import Tensor, nn

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.graph.network import evaluating, trace
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.program.planner import plan
from dsp_kernels.program.steps import ConvStep, Program, ValueRef, map_nested
from dsp_kernels.run.gpu import plan as gpu_plan
from dsp_kernels.run.gpu import program as cuda
from dsp_kernels.run.gpu.layout import GpuConv, GpuLayer, GpuLayout, layout_for_batch
from dsp_kernels.run.gpu.memory import arena_for, value_shapes
from dsp_kernels.run.gpu.program import CudaExecutor, GpuRunner
from dsp_kernels.run.gpu.tune import Choices, Tuner
from dsp_kernels.run.registry import Registry
from dsp_kernels.tolerances import network_tolerance

SHAPE = (3, 8, 8)


class StandInConv:
    """A GpuConv by the reference. It asserts what a real kernel would silently get wrong."""

    def __init__(self, layer: GpuLayer) -> None:
        self.layer = layer

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        for tensor in (x, out, residual):
            assert tensor is None or (tensor.is_contiguous() and tensor.data_ptr() % 16 == 0)
        assert not _overlap(x, out)
        assert residual is None or residual.data_ptr() == out.data_ptr() or not _overlap(residual, out)
        nchw = self.layer.layout.as_nchw
        added = None if residual is None else nchw(residual)
        y = definition(self.layer.spec, nchw(x), self.layer.weights, self.layer.bias, added)
        out.fill_(float("nan"))
        nchw(out).copy_(y)
        StandIn.clock += StandIn.cost


class StandIn:
    """GpuKernels for the CPU without 1x1 convolutions, so that some run in plain PyTorch."""

    name = "stand-in"
    prepared = 0
    clock, cost = 0.0, 1.0  # seconds of all its convolutions so far, and of one

    def can_run(self, spec: ConvSpec, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        return spec.kernel_size != (1, 1), "1x1"

    def prepare(self, layer: GpuLayer) -> StandInConv:
        self.prepared += 1
        return StandInConv(layer)

    def options(self, layer: GpuLayer, shape: Sequence[int]) -> dict[str, Callable[[], GpuConv]]:
        return {self.name: lambda: self.prepare(layer)}


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    """As ``FusedNetwork`` calls a runner."""
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    kernels = StandIn()
    for module in (cuda, gpu_plan):
        monkeypatch.setattr(module, "GPU_KERNELS", Registry("GPU kernel", kernels))
    # Memory starts as NaN, so that a read of uninitialised memory shows.
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = empty(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(0xFF) if made.dtype == torch.uint8 else made

    monkeypatch.setattr(cuda.torch, "empty", poisoned)
    return kernels


def program_of(model: nn.Module, example: Example) -> Program:
    with evaluating(model):
        dtype = as_inputs(example)[0].dtype
        return plan(trace(model, example)).map_tensors(lambda tensor: tensor.detach().to(dtype))


def residual_program(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Program]:
    model = nets.make("residual").to(dtype)
    return model, program_of(model, torch.randn(1, *SHAPE, dtype=dtype))


def assert_same(program: Program, model: nn.Module, x: Tensor) -> None:
    got, expected = GpuRunner(program)([x])[0], model(x)
    assert got.shape == expected.shape
    assert got.is_contiguous()
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= network_tolerance(torch.float64, 1000, len(program.steps))


@pytest.mark.parametrize("batch", [1, 3, 8, 16])
@pytest.mark.parametrize("name", nets.NAMES)
def test_both_layouts_give_the_result_of_the_model(name: str, batch: int) -> None:
    model = nets.make(name).double()
    x = torch.randn(batch, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
    assert_same(program_of(model, x[:1]), model, x)


@pytest.mark.parametrize("batch", [3, 8])
@pytest.mark.parametrize("name", [*nets.ANSWERS, *nets.INPUT_SHAPES])
def test_several_inputs_and_outputs(name: str, batch: int) -> None:
    model, inputs = nets.answering(name).double(), nets.inputs_of(name, batch, torch.float64)
    program = program_of(model, nets.inputs_of(name, 1, torch.float64))
    runner = GpuRunner(program)
    runner([x + 1 for x in inputs])  # its memory is used again
    made = dict(zip(program.outputs, runner(inputs), strict=True))
    got = map_nested(lambda part: made[part.name] if isinstance(part, ValueRef) else part, program.answer)
    torch.testing.assert_close(got, model(*inputs), rtol=0, atol=1e-10)


def test_one_runner_takes_any_image_size_and_batch(kernels: StandIn) -> None:
    model, program = residual_program(torch.float64)
    runner = GpuRunner(program)
    for number, (batch, size) in enumerate(((1, 8), (8, 12), (2, 16), (8, 12), (0, 8), (1, 8), (2, 16))):
        x = torch.randn(batch, 3, size, size, dtype=torch.float64)
        with torch.inference_mode(number % 2 == 0):
            y = runner([x])[0]
        assert torch.allclose(y, model(x), rtol=0, atol=1e-10)
    # Weights are arranged once per layout, not per shape.
    convs = [step for step in program.steps if isinstance(step, ConvStep)]
    assert kernels.prepared == 2 * sum(step.spec.kernel_size != (1, 1) for step in convs)


def test_the_input_may_have_another_dtype() -> None:
    runner = GpuRunner(residual_program(torch.float64)[1])
    x = torch.randn(8, *SHAPE)
    assert torch.equal(runner([x])[0], runner([x.double()])[0])


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 3, padding=1)
        self.squeeze = nn.Conv2d(10, 10, 1)
        self.last = nn.Conv2d(5, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = x * torch.sigmoid(self.squeeze(nn.functional.adaptive_avg_pool2d(x, 1)))
        first, second = x.chunk(2, 1)
        return self.last(first + second).mean((2, 3))


class Sliced(nn.Module):
    """A TorchStep returns a view of memory that is reused before the view is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 1, 3, padding=1)
        self.rest = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(4)))

    def forward(self, x: Tensor) -> Tensor:
        part = self.first(x)[:, :, 2:]  # of one channel: a view without a copy for one image
        return self.rest(part) + part


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("kind", [Joined, Sliced])
def test_other_steps(kind: type[nn.Module], batch: int) -> None:
    model = kind().double().eval()
    x = torch.randn(batch, *SHAPE, dtype=torch.float64)
    assert_same(program_of(model, x), model, x)


def test_the_next_call_does_not_change_an_earlier_result() -> None:
    runner = GpuRunner(residual_program()[1])
    first = runner([torch.randn(8, *SHAPE)])[0]
    kept = first.clone()
    runner([torch.randn(8, *SHAPE)])[0]
    assert torch.equal(first, kept)


def test_concurrent_calls_do_not_mix_their_images() -> None:
    runner = GpuRunner(residual_program()[1])
    images = [torch.randn(8, *SHAPE) for _ in range(4)]
    expected = [runner([x])[0] for x in images]

    def is_right(number: int) -> bool:
        return all(torch.equal(runner([images[number]])[0], expected[number]) for _ in range(5))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(is_right, range(4)))


def test_the_memory_plan_reuses_memory() -> None:
    convs = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(10)]
    program = program_of(nn.Sequential(*convs).eval(), torch.randn(8, 8, 16, 16))
    arena = arena_for(program, value_shapes(program, [(8, 8, 16, 16)], torch.float32), 4)
    assert arena.bytes == 2 * 8 * 8 * 16 * 16 * 4


def test_a_residual_is_overwritten_in_place_after_its_last_use() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.first = nn.Conv2d(8, 8, 3, padding=1)
            self.second = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.second(self.first(x)) + x

    program = program_of(Block().eval(), torch.randn(8, *SHAPE))
    arena = arena_for(program, value_shapes(program, [(8, *SHAPE)], torch.float32), 4)
    last = program.steps[-1]
    assert isinstance(last, ConvStep)
    assert len(last.inputs) == 2
    assert arena.offset[last.output] == arena.offset[last.inputs[1]]


def test_describe_names_the_kernels_or_why_there_are_none(
    kernels: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = program_of(nets.make("residual"), torch.randn(8, *SHAPE))
    monkeypatch.setattr(cuda, "warn_of_missing", lambda device: None)
    executor = CudaExecutor("stand-in")
    run = executor.prepare(program)
    run([torch.randn(8, *SHAPE)])
    before = kernels.prepared
    forms = executor.describe(program)
    assert kernels.prepared == before  # it describes what runs
    for step, form in zip(program.steps, forms, strict=True):
        if isinstance(step, ConvStep):
            pointwise = step.spec.kernel_size == (1, 1)
            assert form == "PyTorch CHWN: stand-in: 1x1" if pointwise else "stand-in CHWN"
    able, reason = CudaExecutor("stand-in").can_run(program, torch.float32, torch.device("cpu"))
    assert not able
    assert "cpu" in reason


def test_weights_are_not_arranged_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, x = GpuRunner(residual_program()[1]), torch.randn(8, *SHAPE)
    capturing = True
    monkeypatch.setattr(cuda, "is_capturing", lambda device: capturing)
    with pytest.raises(DSPBackendError, match="call it once before"):
        runner([x])[0]
    capturing = False
    expected = runner([x])[0]
    capturing = True
    assert torch.equal(runner([x])[0], expected)


def test_what_a_graph_of_the_caller_reads_lives_as_long_as_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[weakref.ref[Any]] = []
    step_call = gpu_plan.step_call

    def recorded(*operands: Any) -> Any:
        call = step_call(*operands)
        made.append(weakref.ref(call))
        return call

    monkeypatch.setattr(gpu_plan, "step_call", recorded)
    model = Joined().double().eval()
    x = torch.randn(8, *SHAPE, dtype=torch.float64)
    runner = GpuRunner(program_of(model, x))
    expected = runner([x])[0]
    captured = len(made)
    with monkeypatch.context() as during:
        during.setattr(cuda, "is_capturing", lambda device: True)
        during.setattr(torch, "tensor", lambda *_, **__: pytest.fail("copied from the host in a capture"))
        assert torch.equal(runner([x])[0], expected)
    for size in range(9, 20):  # more input shapes than are kept
        runner([torch.randn(1, 3, size, size, dtype=torch.float64)])[0]
    gc.collect()
    assert all(call() is not None for call in made[:captured])
    assert made[captured]() is None
    del runner
    gc.collect()
    assert all(call() is None for call in made)


def test_a_call_on_a_gpu_asks_once_whether_it_is_captured_and_keeps_its_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []
    kept: list[int] = []
    monkeypatch.setattr(cuda, "is_capturing", lambda device: bool(asked.append(device)))
    monkeypatch.setattr(cuda, "capture", lambda launch, *_: launch)
    model, x = nets.make("residual").double(), torch.randn(8, *SHAPE, dtype=torch.float64)
    with pretended_gpu(), monkeypatch.context() as during:
        during.setattr(Tensor, "record_stream", lambda memory, stream: kept.append(memory.nbytes))
        there = x.to("cuda")
        runner = GpuRunner(
            program_of(model.to("cuda"), there), make_tuner=lambda *_: Tuner(Choices(Path(os.devnull)), None)
        )
        for calls in (1, 2):
            got = runner([there])[0]
            assert got.is_cuda
            assert asked == [there.device] * calls
            assert len(kept) == calls
            assert kept[0] > x.nbytes
    assert torch.allclose(got, model(x), rtol=0, atol=1e-10)


def test_memory_that_is_not_aligned_to_16_bytes_is_copied() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(x.roll(1, 3)[:, :, 1:])  # a view of what PyTorch returned

    model = Views().double().eval()
    x = torch.randn(3, 1, 5, 5, dtype=torch.float64)
    assert_same(program_of(model, x), model, x[1:2])
    for layout in GpuLayout:
        aligned = layout.from_nchw(x.half().contiguous(memory_format=torch.channels_last)[1:])
        assert aligned.data_ptr() % 16 == 0
        assert torch.equal(layout.as_nchw(aligned), x.half()[1:])


@pytest.mark.parametrize(("cost", "expected"), [(1.0, "stand-in NHWC"), (3.0, "PyTorch NHWC")])
def test_every_step_runs_on_what_is_measured_to_be_the_fastest(
    cost: float, expected: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    eager_conv = gpu_plan.eager_conv

    def timed(layer: GpuLayer) -> GpuConv:
        conv = eager_conv(layer)

        def run(*operands: Any) -> None:
            conv(*operands)
            StandIn.clock += 2.0 + (layer.layout is GpuLayout.CHWN)

        return run

    def seconds(launch: Callable[[], None]) -> float:
        before = StandIn.clock
        launch()
        measured.append(StandIn.clock - before)
        return measured[-1]

    monkeypatch.setattr(gpu_plan, "eager_conv", timed)
    monkeypatch.setattr(StandIn, "cost", cost)
    model, program = residual_program(torch.float64)
    x = torch.randn(8, *SHAPE, dtype=torch.float64)
    for _ in range(2):  # the second time everything is on disk
        measured: list[float] = []
        choices = Choices(tmp_path / "choices.json")
        runner = GpuRunner(program, make_tuner=lambda device, what, choices=choices: Tuner(choices, seconds))
        assert torch.allclose(runner([x])[0], model(x), rtol=0, atol=1e-10)
    assert not measured
    forms = runner.plan([x.shape]).forms
    convs = [step for step in program.steps if isinstance(step, ConvStep) and step.spec.kernel_size != (1, 1)]
    assert {forms[step.output] for step in convs} == {expected}
    # The network as a whole is measured even where no time is left for its steps.
    late = GpuRunner(program, make_tuner=lambda *_: Tuner(Choices(tmp_path / "late"), seconds, budget=0.0))
    assert {late.plan([x.shape]).forms[step.output] for step in convs} == {expected}


def test_layouts_keep_the_values() -> None:
    x = torch.randn(8, 3, 4, 5)
    for layout in GpuLayout:
        converted = layout.from_nchw(x)
        assert converted.is_contiguous()
        assert tuple(converted.shape) == layout.shape(x.shape)
        assert torch.equal(layout.as_nchw(converted), x)
    chosen = [layout_for_batch(batch).name for batch in (1, 8, 12, 16)]
    assert chosen == ["NHWC", "CHWN", "NHWC", "CHWN"]


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    first, second = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in (a, b))
    return second[0] < first[1]
