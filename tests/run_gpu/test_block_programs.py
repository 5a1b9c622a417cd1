"""Networks with residual blocks as one kernel: the executor on the CPU, the kernel by its definition."""

from collections.abc import Iterator
from typing import ClassVar

import block_cases
import ptx_checks
import pytest
import torch
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPBackendError, DSPError
from dsp_kernels.graph.network import evaluating, trace
from dsp_kernels.program.planner import plan
from dsp_kernels.program.steps import ConvStep, Program
from dsp_kernels.run.gpu import plan as gpu_plan
from dsp_kernels.run.gpu import program as cuda
from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock
from dsp_kernels.run.gpu.layout import GpuLayout
from dsp_kernels.run.gpu.program import GpuRunner
from dsp_kernels.tolerances import network_tolerance
from dsp_pruning.models import cifar_resnet

SIZE = (3, 8, 8)


class Bottlenecks(nn.Module):
    """Two bottlenecks, the first with a shortcut and a stride; groups of unequal sizes."""

    def __init__(self) -> None:
        super().__init__()
        widen = GroupStructure.build(6, 12, [(range(4), range(0, 12, 2)), ([1, 5], range(1, 10, 2))])
        inner = GroupStructure.build(5, 6, [([0, 4], [1, 2]), ([1, 2, 3], [5, 0, 3])])
        self.stem, self.shortcut = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 1, stride=2)
        self.first = nn.ModuleList(
            [nn.Conv2d(8, 5, 1), PackedConv2d(inner, 3, stride=2, padding=1), PackedConv2d(widen, 1)]
        )
        self.second = nn.ModuleList(
            [nn.Conv2d(12, 5, 1), PackedConv2d(inner, 3, padding=1), PackedConv2d(widen, 1)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        for convs in (self.first, self.second):
            y = torch.relu(convs[1](torch.relu(convs[0](x))))
            x = torch.relu(convs[2](y) + (self.shortcut(x) if convs is self.first else x))
        return x.mean((2, 3))


class HostBlock(CudaBlock):
    """A block by its definition; tests/cuda_ptx runs the kernel itself."""

    launches: ClassVar[list[str]] = []

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        nchw = GpuLayout.CHWN.as_nchw
        added = None if residual is None else nchw(residual)
        nchw(out).copy_(block_cases.reference(self.step, nchw(x), added))
        self.launches.append(self.step.output)


@pytest.fixture(autouse=True)
def _on_the_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Single convolutions run in plain PyTorch."""
    monkeypatch.setattr(
        gpu_plan, "why_no_blocks", lambda dtype, device, layout: "" if layout is GpuLayout.CHWN else "NHWC"
    )
    monkeypatch.setattr(gpu_plan, "CudaBlock", HostBlock)
    monkeypatch.delenv("DSP_KERNELS_BLOCKS", raising=False)
    HostBlock.launches.clear()
    with torch.no_grad():
        yield


def program_of(model: nn.Module, dtype: torch.dtype = torch.float16) -> Program:
    with evaluating(model):
        program = plan(trace(model, torch.zeros(8, *SIZE)))
    return program.map_tensors(
        lambda tensor: tensor.detach().to(dtype) if tensor.is_floating_point() else tensor
    )


def model_of(name: str) -> nn.Module:
    torch.manual_seed(1)
    model = cifar_resnet(8, 10) if name == "basic" else Bottlenecks()
    return model.eval()


def assert_close(got: Tensor, model: nn.Module, x: Tensor) -> None:
    expected = model.double()(x.double())
    assert got.shape == expected.shape
    error = (got.double() - expected).abs().max() / expected.abs().max()
    assert error <= network_tolerance(torch.float16, 600, 12)


def images(batch: int) -> Tensor:
    return torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(0)).half()


def runner_of(model: nn.Module, *wanted: str) -> GpuRunner:
    return ptx_checks.runner_of(model, torch.float16, SIZE, *wanted)


@pytest.mark.parametrize(
    ("name", "blocks", "batch"), [("basic", 3, 8), ("bottlenecks", 2, 16), ("bottlenecks", 2, 3)]
)
def test_a_network_of_blocks(name: str, blocks: int, batch: int) -> None:
    model = model_of(name)
    x = images(batch)  # three images are padded to eight
    assert_close(runner_of(model, "CHWN", "one block")(x), model, x)
    assert len(HostBlock.launches) == blocks


def test_blocks_run_only_where_they_are_wanted_and_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = model_of("bottlenecks"), images(8)
    without = runner_of(model, "convolutions")(x)
    monkeypatch.setenv("DSP_KERNELS_BLOCKS", "0")
    runner_of(model, "one block")(x)
    assert not HostBlock.launches
    monkeypatch.setenv("DSP_KERNELS_BLOCKS", "yes")
    with pytest.raises(DSPError, match="expected 0 or 1"):
        runner_of(model)
    assert_close(without, model, x)


def test_the_plan_says_what_every_step_runs_on() -> None:
    model = model_of("basic")
    program = program_of(model)
    forms = runner_of(model, "one block").plan((8, *SIZE)).forms
    for step in program.steps:
        if isinstance(step, ConvStep) and len(step.inputs) == 2:
            assert "tiles" in forms[step.output]
            # The inner convolution, and the shortcut of two blocks.
            assert sum(form == f"part of {step.output}" for form in forms.values()) in (1, 2)


def test_blocks_are_not_planned_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(model_of("bottlenecks"), "one block")
    x = images(8)
    expected = runner(x)
    monkeypatch.setattr(cuda, "is_capturing", lambda device: True)
    assert torch.equal(runner(x), expected)
    with pytest.raises(DSPBackendError, match="call it once before"):
        runner(torch.cat([x, x]))


def test_a_batch_is_not_padded_if_a_step_may_mix_its_images() -> None:
    class Mixing(Bottlenecks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(0)

    assert runner_of(Mixing().eval(), "CHWN").plan((3, *SIZE)).shape[0] == 3
    assert runner_of(Bottlenecks().eval(), "CHWN").plan((3, *SIZE)).shape[0] == 8


def test_an_output_without_batch_dimension() -> None:
    class Flat(Bottlenecks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flatten()

    model = Flat().eval()
    x = images(3)
    assert_close(runner_of(model, "one block")(x), model, x)
