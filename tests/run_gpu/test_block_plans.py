"""Which residual blocks of the released networks would run as one kernel; needs neither GPU nor kernels."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from dsp_benchmarks.measure.floors import part_floor
from dsp_benchmarks.measure.peaks import Peaks
from dsp_benchmarks.subjects.networks import NetworkSource, load_network

from dsp_kernels.program.steps import ConvStep, Program
from dsp_kernels.run.gpu.cuda.blocks.cost import H200, conv_seconds
from dsp_kernels.run.gpu.cuda.blocks.plan import BlockPlan, plan_blocks
from dsp_kernels.run.gpu.cuda.blocks.step import blocks_of, residual_last, with_blocks
from dsp_kernels.run.gpu.memory import value_shapes

HALF = torch.float16
# Image size, number of blocks, of these with a shortcut convolution, convolutions per block.
NETWORKS = {
    "resnet20_g4": (32, 9, 2, 2),
    "resnet56_g4": (32, 27, 2, 2),
    "resnet18_g2_80": (224, 8, 3, 2),
    "resnet50_g2_80": (224, 16, 4, 3),
}
SM_86 = replace(H200, shared_per_block=101376, shared_per_multiprocessor=102400)


@cache
def program_of(name: str) -> Program:
    # Structures do not depend on the image size, and packing is faster for small images.
    return residual_last(load_network(NetworkSource(name, image_size=32)).program("packed"))


@cache
def shapes_of(name: str, batch: int) -> dict[str, tuple[int, ...] | None]:
    size = NETWORKS[name][0]
    return value_shapes(program_of(name), (batch, 3, size, size), HALF)


@cache
def plans_of(name: str, batch: int) -> list[BlockPlan]:
    return plan_blocks(program_of(name), shapes_of(name, batch), H200)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_residual_block_is_found(name: str, shared: Path) -> None:
    _, blocks, shortcuts, convs = NETWORKS[name]
    program = program_of(name)
    found = blocks_of(program)
    assert len(found) == blocks
    assert sum(block.shortcut is not None for block in found) == shortcuts
    assert {len(block.convs) for block in found} == {convs}
    fused = with_blocks(program, found)
    # Only the stem is left.
    assert sum(isinstance(step, ConvStep) for step in fused.steps) == 1
    made = {fused.input}
    for step in fused.steps:
        assert set(step.inputs) <= made, f"{step.output} reads an undefined value"
        made.add(step.output)


@pytest.mark.parametrize(
    ("name", "batch"), [("resnet20_g4", 256), ("resnet56_g4", 32), ("resnet50_g2_80", 256)]
)
def test_plans_agree_with_floors_costs_and_limits(name: str, batch: int, shared: Path) -> None:
    program, shapes = program_of(name), shapes_of(name, batch)
    peaks = Peaks({"float16": H200.peak_flops}, H200.bandwidth, H200.launch)
    sized = replace(program, shapes={key: shape for key, shape in shapes.items() if shape})
    for plan in plans_of(name, batch):
        assert plan.floor < plan.seconds <= plan.per_conv
        assert plan.per_conv == sum(conv_seconds(conv, shapes, H200) for conv in plan.block.members)
        steps = [step for step in program.steps if step.output in {m.output for m in plan.block.members}]
        assert plan.floor == pytest.approx(part_floor(sized, steps, batch, peaks, HALF))
        assert f"{1e6 * plan.floor:.1f} us" in plan.describe()
        assert "estimates" in plan.describe()
        if plan.geometry is None:
            assert "per convolution" in plan.describe()
            continue
        assert plan.step is not None
        assert plan.seconds < plan.per_conv
        assert plan.geometry.shared_bytes <= H200.shared_per_block
        assert f"{plan.geometry.shared_bytes} bytes" in plan.describe()
        output = plan.geometry.regions[-1]
        assert (output.height, output.width) == shapes[plan.step.output][2:]  # type: ignore[index]


def test_blocks_that_are_predicted_to_gain(shared: Path) -> None:
    """CIFAR stages bound by memory or launches, but no stage bound by mma.sync."""
    small = plans_of("resnet20_g4", 256)
    assert all(plan.step is plan.block for plan in small[:4])
    large = plans_of("resnet50_g2_80", 256)
    assert large[0].step is not None
    assert all(plan.step is None for plan in large[-3:])  # the stage of 7 x 7
    # If the input does not fit into shared memory, the first convolution keeps its own kernel.
    assert any(plan.step and plan.step.convs == plan.block.convs[1:] for plan in large)


def test_plans_fit_the_smallest_chip(shared: Path) -> None:
    plans = plan_blocks(program_of("resnet20_g4"), shapes_of("resnet20_g4", 256), SM_86)
    chosen = [plan.geometry for plan in plans if plan.geometry is not None]
    assert len(chosen) >= 4
    assert all(geometry.shared_bytes <= SM_86.shared_per_block for geometry in chosen)
