"""Residual blocks as one kernel: which are found and what is worth measuring; needs no GPU and no kernels."""

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from dsp_benchmarks.subjects.networks import NetworkSource, load_network

from dsp_kernels import GroupStructure
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.program.steps import ConvStep, Program
from dsp_kernels.run.gpu.cuda.blocks.plan import H200, Limits, block_options
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep, blocks_of, residual_last, with_blocks
from dsp_kernels.run.gpu.cuda.blocks.tables import block_tables
from dsp_kernels.run.gpu.memory import value_shapes

HALF = torch.float16
# Image size, number of blocks, of these with a shortcut convolution, convolutions per block.
NETWORKS = {
    "resnet20_g4": (32, 9, 2, 2),
    "resnet56_g4": (32, 27, 2, 2),
    "resnet18_g2_80": (224, 8, 3, 2),
    "resnet50_g2_80": (224, 16, 4, 3),
}
SM_86 = H200._replace(shared_per_block=101376, shared_per_multiprocessor=102400)


@cache
def program_of(name: str) -> Program:
    # Structures do not depend on the image size, and packing is faster for small images.
    return residual_last(load_network(NetworkSource(name, image_size=32)).program("packed"))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_residual_block_is_found(name: str) -> None:
    _, blocks, shortcuts, convs = NETWORKS[name]
    program = program_of(name)
    found = blocks_of(program)
    assert len(found) == blocks
    assert sum(block.shortcut is not None for block in found) == shortcuts
    assert {len(block.convs) for block in found} == {convs}
    fused = with_blocks(program, found)
    # Only the stem is left.
    assert sum(isinstance(step, ConvStep) for step in fused.steps) == 1
    made = set(fused.inputs)
    for step in fused.steps:
        assert set(step.inputs) <= made, f"{step.output} reads an undefined value"
        made.add(step.output)


def test_what_a_network_answers_is_not_inside_a_block() -> None:
    program = program_of("resnet20_g4")
    inner = blocks_of(program)[0].convs[0].output
    found = blocks_of(replace(program, outputs=(inner, *program.outputs)))
    assert inner not in {conv.output for block in found for conv in block.members}


@pytest.mark.parametrize("limits", [H200, SM_86], ids=["H200", "sm_86"])
@pytest.mark.parametrize(("name", "batch"), [("resnet20_g4", 256), ("resnet50_g2_80", 32)])
def test_a_few_geometries_that_fit_are_measured(name: str, batch: int, limits: Limits) -> None:
    program, size = program_of(name), NETWORKS[name][0]
    shapes = value_shapes(program, [(batch, 3, size, size)], HALF)
    for block in blocks_of(program):
        options = block_options(block, shapes, limits)
        assert len(options) <= 9
        for step, geometry in options.values():
            assert set(step.members) <= set(block.members)
            assert geometry.shared_bytes <= limits.shared_per_block
            output = geometry.regions[-1]
            assert (output.height, output.width) == shapes[step.output][2:]  # type: ignore[index]
    first = block_options(blocks_of(program)[0], shapes, limits)
    assert any(step.convs == blocks_of(program)[0].convs for step, _ in first.values())


def grouped(
    output: str, x: str, channels: tuple[int, int], groups: int, kernel: int, stride: int = 1
) -> ConvStep:
    (a, b), padding = channels, (kernel // 2, kernel // 2)
    spec = ConvSpec(GroupStructure.uniform(a, b, groups), (kernel, kernel), (stride, stride), padding)
    weights = torch.ones(groups, b // groups, a // groups, kernel, kernel)
    return ConvStep(output, (x,), spec, tuple(weights), None)


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
@pytest.mark.parametrize(("a", "b"), [(8, 16), (16, 32), (12, 24)])
def test_every_grouping_of_a_block_with_a_shortcut_has_tables(a: int, b: int, kind: str) -> None:
    for first, last, shortcut in product([g for g in (1, 2, 3, 4, 8, 16) if a % g == b % g == 0], repeat=3):
        convs = (grouped("m", "x", (a, b), first, 3, 2), grouped("y", "m", (b, b), last, 3))
        if kind == "bottleneck":
            inner = grouped("l", "x", (a, a), first, 1), grouped("m", "l", (a, a), last, 3, 2)
            convs = (*inner, grouped("y", "m", (a, b), first, 1))
        step = BlockStep("y", ("x",), convs, grouped("s", "x", (a, b), shortcut, 1, 2))
        tables = block_tables(step, HALF, torch.device("cpu"))
        written = [target for tile in tables.tiles[-1] for target in tile.targets if target >= 0]
        assert sorted(written) == list(range(b))
        for tile in tables.tiles[-1]:
            needed = {target * shortcut // b for target in tile.targets if target >= 0}
            assert {row[0] * shortcut // a for row in tile.second_rows} == needed  # groups of the shortcut
