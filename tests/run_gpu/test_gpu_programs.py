"""The GPU executor's own work, on the CPU: layouts, the memory plan, writing over a residual, keeping runs.

The kernels are played by PyTorch, behind the interface of the real ones; they check what they are given.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence

import nets
import pytest
import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.graph.network import evaluating, trace
from dsp_kernels.op.reference import gather_grouped_conv2d_reference
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.program.planner import plan
from dsp_kernels.program.steps import ConvStep, Program
from dsp_kernels.run.gpu import program as cuda
from dsp_kernels.run.gpu.graphs import LRU
from dsp_kernels.run.gpu.layout import GpuLayout, all_groups, layout_for_batch
from dsp_kernels.run.gpu.memory import arena_for, value_shapes
from dsp_kernels.run.gpu.program import CudaExecutor, GpuRunner
from dsp_kernels.run.registry import Registry
from dsp_kernels.tolerances import network_tolerance


class PlayedConv:
    """A GpuConv by the reference. It refuses what a real kernel would silently get wrong."""

    def __init__(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None, layout: GpuLayout
    ) -> None:
        self.spec, self.weights, self.bias, self.layout = spec, weights, bias, layout

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        for tensor in (x, out, residual):
            assert tensor is None or tensor.is_contiguous()
        assert not _overlap(x, out)
        assert residual is None or residual.data_ptr() == out.data_ptr() or not _overlap(residual, out)
        spec, nchw = self.spec, self.layout.as_nchw
        y = gather_grouped_conv2d_reference(
            nchw(x),
            self.weights,
            spec.structure,
            self.bias,
            None if residual is None else nchw(residual),
            kernel_size=spec.kernel_size,
            stride=spec.stride,
            padding=spec.padding,
            dilation=spec.dilation,
            activation=spec.activation,
        )
        out.fill_(float("nan"))
        nchw(out).copy_(y)


class Played:
    """GpuKernels for the CPU that refuse 1x1 convolutions, so that some run in plain PyTorch."""

    name = "played"
    prepared = 0

    def can_run(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: GpuLayout
    ) -> tuple[bool, str]:
        return spec.kernel_size != (1, 1), "1x1"

    def prepare(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None, layout: GpuLayout
    ) -> PlayedConv:
        self.prepared += 1
        return PlayedConv(spec, weights, bias, layout)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    """As ``FusedNetwork`` calls a runner."""
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    registry: Registry[Played] = Registry("GPU kernel")
    kernels = registry.register(Played())
    monkeypatch.setattr(cuda, "GPU_KERNELS", registry)
    # Memory is handed out full of NaN: who reads what nobody wrote shows it.
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        made = empty(*args, **kwargs)  # type: ignore[call-overload]
        return made.fill_(0xFF) if made.dtype == torch.uint8 else made

    monkeypatch.setattr(cuda.torch, "empty", poisoned)
    return kernels


def program_of(model: nn.Module, example: Tensor) -> Program:
    with evaluating(model):
        return plan(trace(model, example)).map_tensors(lambda tensor: tensor.detach().to(example.dtype))


def error(got: Tensor, expected: Tensor) -> float:
    return (got - expected).abs().max().item() / max(expected.abs().max().item(), 1e-30)


@pytest.mark.parametrize("batch", [1, 3, 8, 16])
@pytest.mark.parametrize("name", nets.NAMES)
def test_a_network_is_the_same_in_both_layouts(name: str, batch: int) -> None:
    model, shape = nets.make(name), (3, 8, 8)
    model = model.double()
    x = torch.randn(batch, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(batch))
    program = program_of(model, x[:1])
    got = GpuRunner(program)(x)
    with torch.no_grad():
        expected = model(x)
    assert got.shape == expected.shape
    assert got.is_contiguous()
    assert error(got, expected) <= network_tolerance(torch.float64, 1000, len(program.steps))


def test_other_image_sizes_and_batches_on_one_runner(played: Played) -> None:
    model, shape = nets.make("residual"), (3, 8, 8)
    model = model.double()
    runner = GpuRunner(program_of(model, torch.randn(1, *shape).double()))
    for batch, size in ((1, 8), (8, 12), (2, 16), (8, 12), (0, 8), (1, 8)):
        x = torch.randn(batch, 3, size, size, dtype=torch.float64)
        with torch.no_grad():
            assert torch.allclose(runner(x), model(x), rtol=0, atol=1e-10)
    # Weights are arranged once for each layout, not for each shape.
    assert played.prepared == 2 * sum(
        isinstance(step, ConvStep) and step.spec.kernel_size != (1, 1) for step in runner._program.steps
    )


def test_the_image_may_be_of_another_dtype() -> None:
    model, shape = nets.make("residual").double(), (3, 8, 8)
    runner = GpuRunner(program_of(model, torch.randn(1, *shape).double()))
    x = torch.randn(8, *shape)
    assert torch.equal(runner(x), runner(x.double()))


def test_networks_that_join_split_and_gate_channels() -> None:
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

    model = Joined().double().eval()
    for batch in (2, 8):
        x = torch.randn(batch, 3, 8, 8, dtype=torch.float64)
        program = program_of(model, x)
        assert torch.allclose(GpuRunner(program)(x), model(x), rtol=0, atol=1e-12)


def test_answers_stay_when_the_next_call_comes() -> None:
    model, shape = nets.make("residual"), (3, 8, 8)
    runner = GpuRunner(program_of(model, torch.randn(1, *shape)))
    first = runner(torch.randn(8, *shape))
    kept = first.clone()
    runner(torch.randn(8, *shape))
    assert torch.equal(first, kept)


def test_threads_do_not_mix_their_images() -> None:
    model, shape = nets.make("residual"), (3, 8, 8)
    runner = GpuRunner(program_of(model, torch.randn(1, *shape)))
    images = [torch.randn(8, *shape) for _ in range(4)]
    expected = [runner(x) for x in images]
    wrong: list[int] = []

    def work(number: int) -> None:
        answers = [runner(images[number]) for _ in range(5)]
        wrong.extend(number for answer in answers if not torch.equal(answer, expected[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("name", nets.NAMES)
def test_values_that_live_at_once_do_not_overlap(name: str) -> None:
    model, shape = nets.make(name), (3, 8, 8)
    program = program_of(model, torch.randn(8, *shape))
    shapes = value_shapes(program, (8, *shape), torch.float32)
    arena = arena_for(program, shapes, 4)
    for step in program.steps:
        if isinstance(step, ConvStep):
            x, out = step.inputs[0], step.output
            spans = [_span(arena.offset[name], shapes[name]) for name in (x, out) if name in arena.offset]
            assert len(spans) < 2 or spans[0][1] <= spans[1][0] or spans[1][1] <= spans[0][0]
    total = sum(_span(0, shapes[name])[1] for name in arena.offset)
    assert arena.bytes <= total


def test_the_memory_plan_reuses_memory() -> None:
    """A chain of equal layers needs two places, however long it is."""
    convs = [nn.Conv2d(8, 8, 3, padding=1) for _ in range(10)]
    program = program_of(nn.Sequential(*convs).eval(), torch.randn(8, 8, 16, 16))
    arena = arena_for(program, value_shapes(program, (8, 8, 16, 16), torch.float32), 4)
    assert arena.bytes == 2 * 8 * 8 * 16 * 16 * 4


def test_a_residual_that_nobody_reads_later_is_written_over() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3, padding=1)
            self.first = nn.Conv2d(8, 8, 3, padding=1)
            self.second = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.second(self.first(x)) + x

    program = program_of(Block().eval(), torch.randn(8, 3, 8, 8))
    arena = arena_for(program, value_shapes(program, (8, 3, 8, 8), torch.float32), 4)
    last = program.steps[-1]
    assert isinstance(last, ConvStep)
    assert len(last.inputs) == 2
    assert arena.offset[last.output] == arena.offset[last.inputs[1]]


def test_a_view_that_an_unknown_operation_hands_on_keeps_its_numbers() -> None:
    class Sliced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 1, 3, padding=1)
            self.rest = nn.Sequential(*(nn.Conv2d(1, 1, 3, padding=1) for _ in range(4)))

        def forward(self, x: Tensor) -> Tensor:
            part = self.first(x)[:, :, 2:]  # of one channel and one image: lies in memory as it is
            return self.rest(part) + part

    model = Sliced().double().eval()
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(GpuRunner(program_of(model, x))(x), model(x), rtol=0, atol=1e-12)


def test_what_the_kernels_refuse_is_named(played: Played) -> None:
    model, shape = nets.make("residual"), (3, 8, 8)
    program = program_of(model, torch.randn(8, *shape))
    forms = CudaExecutor().describe(program)
    convs = [
        (step, form) for step, form in zip(program.steps, forms, strict=True) if isinstance(step, ConvStep)
    ]
    for step, form in convs:
        assert ("1x1" in form) == (step.spec.kernel_size == (1, 1)), form
        assert form.startswith("plain PyTorch") or form == "played CHWN"
    able, reason = CudaExecutor().can_run(program, torch.float32, torch.device("cpu"))
    assert not able
    assert "cpu" in reason


def test_an_unknown_network_cannot_be_recorded_before_its_first_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, shape = nets.make("residual"), (3, 8, 8)
    runner = GpuRunner(program_of(model, torch.randn(1, *shape)))
    monkeypatch.setattr(cuda, "is_capturing", lambda device: True)
    with pytest.raises(DSPBackendError, match="call it once before"):
        runner(torch.randn(8, *shape))
    monkeypatch.setattr(cuda, "is_capturing", lambda device: False)
    expected = runner(x := torch.randn(8, *shape))
    monkeypatch.setattr(cuda, "is_capturing", lambda device: True)
    assert torch.equal(runner(x), expected)


def test_runs_are_kept_for_the_latest_shapes_only() -> None:
    kept: LRU[int] = LRU(2)
    made = []

    def make(key: int) -> int:
        made.append(key)
        return key

    for key in (1, 2, 1, 3, 1, 2):
        assert kept.get(key, lambda key=key: make(key)) == key
    assert made == [1, 2, 3, 2]
    assert len(kept) == 2


def test_layouts_keep_the_numbers() -> None:
    x = torch.randn(8, 3, 4, 5)
    for layout in GpuLayout:
        there = layout.from_nchw(x)
        assert there.is_contiguous()
        assert tuple(there.shape) == layout.shape(x.shape)
        assert torch.equal(layout.as_nchw(there), x)
    assert [layout_for_batch(n) for n in (1, 8, 12, 16)] == [
        GpuLayout.NHWC,
        GpuLayout.CHWN,
        GpuLayout.NHWC,
        GpuLayout.CHWN,
    ]


def test_the_absent_channels_are_a_group_that_reads_nothing() -> None:
    structure = GroupStructure.build(4, 5, [([0, 1], [3]), ([2], [0, 4])])
    written = [channel for group in all_groups(structure) for channel in group.out_index]
    assert sorted(written) == [0, 1, 2, 3, 4]
    assert all_groups(structure)[-1].in_index == ()
    assert all_groups(GroupStructure.dense(4, 5)) == GroupStructure.dense(4, 5).groups


def test_a_runner_works_after_a_copy_of_its_network() -> None:
    """What fuse() keeps is the Program; a runner is made of closures and is made anew."""
    model, shape = nets.make("residual"), (3, 8, 8)
    program = program_of(model, torch.randn(1, *shape))
    x = torch.randn(8, *shape)
    assert torch.equal(GpuRunner(copy.deepcopy(program))(x), GpuRunner(program)(x))


def _span(offset: int, shape: tuple[int, ...] | None) -> tuple[int, int]:
    return offset, offset + torch.Size(shape or ()).numel() * 4


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    first, second = sorted((t.data_ptr(), t.data_ptr() + t.numel() * t.itemsize) for t in (a, b))
    return second[0] < first[1]
