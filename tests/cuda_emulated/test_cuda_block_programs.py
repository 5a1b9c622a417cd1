"""Networks whose residual blocks run as one kernel: the executor on the CPU, the kernel in the emulation."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest
import torch
from emulation import Emulator
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPBackendError, DSPError
from dsp_kernels.graph.network import evaluating, trace
from dsp_kernels.program.planner import plan
from dsp_kernels.program.steps import ConvStep, Program
from dsp_kernels.run.gpu import blocks as gpu_blocks
from dsp_kernels.run.gpu import program as cuda
from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock
from dsp_kernels.run.gpu.layout import GpuLayout
from dsp_kernels.run.gpu.program import CudaExecutor, GpuRunner
from dsp_kernels.run.registry import Registry
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


@pytest.fixture(autouse=True)
def _on_the_host(monkeypatch: pytest.MonkeyPatch, block_emulator: Emulator) -> Iterator[None]:
    """Blocks run in the emulation and single convolutions in plain PyTorch."""
    monkeypatch.setattr(cuda, "GPU_KERNELS", Registry("GPU kernel"))
    monkeypatch.setattr(
        gpu_blocks, "why_no_blocks", lambda dtype, device, layout: "" if layout is GpuLayout.CHWN else "NHWC"
    )
    monkeypatch.setattr(gpu_blocks, "CudaBlock", partial(CudaBlock, launch=block_emulator))
    monkeypatch.delenv("DSP_KERNELS_BLOCKS", raising=False)
    block_emulator.launches.clear()
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


def difference(model: nn.Module, got: Tensor, x: Tensor) -> float:
    expected = model.double()(x.double())
    return ((got.double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize(
    ("name", "blocks", "batch"), [("basic", 3, 8), ("bottlenecks", 2, 16), ("bottlenecks", 2, 3)]
)
def test_a_network_of_blocks(name: str, blocks: int, batch: int, block_emulator: Emulator) -> None:
    model = model_of(name)
    runner = GpuRunner(program_of(model))
    x = torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(0)).half()
    got = runner(x)
    assert got.shape == (batch, *got.shape[1:])
    assert len(block_emulator.launches) == blocks
    assert difference(model, got, x) <= network_tolerance(torch.float16, 600, 12)


def test_who_does_not_want_blocks(block_emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("bottlenecks")
    program = program_of(model)
    x = torch.randn(8, *SIZE, generator=torch.Generator().manual_seed(0)).half()
    GpuRunner(program, blocks=False)(x[:3])
    GpuRunner(program, blocks=False)(x)
    GpuRunner(program, kernels="triton")(x)
    monkeypatch.setenv("DSP_KERNELS_BLOCKS", "0")
    without = GpuRunner(program)(x)
    assert not block_emulator.launches
    assert difference(model, without, x) <= network_tolerance(torch.float16, 600, 12)
    assert not any("predicted" in form for form in CudaExecutor().describe(program))
    GpuRunner(program, blocks=True)(x)
    assert len(block_emulator.launches) == 2
    monkeypatch.setenv("DSP_KERNELS_BLOCKS", "yes")
    with pytest.raises(DSPError, match="expected 0 or 1"):
        GpuRunner(program)


def test_every_block_is_explained() -> None:
    program = program_of(model_of("basic"))
    forms = dict(zip((step.output for step in program.steps), CudaExecutor().describe(program), strict=True))
    residuals = [
        step.output for step in program.steps if isinstance(step, ConvStep) and len(step.inputs) == 2
    ]
    assert len(residuals) == 3
    for output in residuals:
        assert "predicted" in forms[output]
        assert "floor" in forms[output]
        assert "estimates" in forms[output]
        # The inner convolution, and the shortcut's of two blocks.
        assert sum(form == f"part of {output}" for form in forms.values()) in (1, 2)


def test_a_new_size_cannot_be_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = GpuRunner(program_of(model_of("bottlenecks")))
    x = torch.randn(8, *SIZE).half()
    expected = runner(x)
    monkeypatch.setattr(cuda, "is_capturing", lambda device: True)
    assert torch.equal(runner(x), expected)
    with pytest.raises(DSPBackendError, match="call it once before"):
        runner(torch.cat([x, x]))


def test_a_batch_is_filled_up_only_where_that_is_predicted_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(model_of("bottlenecks"))
    blocks = gpu_blocks.GpuBlocks(program, torch.float16, torch.device("cpu"))
    assert [blocks.batch_for((batch, *SIZE)) for batch in (1, 3, 8, 9)] == [8, 8, 8, 16]
    # Eight times the work, where launches do not matter.
    assert blocks.batch_for((1, 3, 640, 640)) == 1
    without = gpu_blocks.GpuBlocks(program, torch.float16, torch.device("cpu"), wanted=False)
    assert without.batch_for((3, *SIZE)) == 3

    class Mixing(Bottlenecks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flip(0)  # an operation of its own: the last image comes first

    mixing = program_of(Mixing().eval())
    assert gpu_blocks.GpuBlocks(mixing, torch.float16, torch.device("cpu")).batch_for((3, *SIZE)) == 3


def test_an_answer_without_a_batch_is_whole() -> None:
    class Flat(Bottlenecks):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flatten()

    model = Flat().eval()
    x = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(0)).half()
    got = GpuRunner(program_of(model))(x)
    assert got.shape == (3 * 12,)
    assert difference(model, got, x) <= network_tolerance(torch.float16, 600, 12)
