"""Residual blocks as one kernel on a GPU against the definition, and networks with and without blocks."""

import nets
import pytest
import torch
from block_cases import CASES, IDS, BlockCase
from gpu_checks import check_block

import dsp_kernels
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock, why_no_blocks
from dsp_kernels.run.gpu.cuda.blocks.geometry import BlockGeometry
from dsp_kernels.run.gpu.cuda.blocks.plan import block_options, limits_of
from dsp_kernels.run.gpu.cuda.blocks.tables import block_tables
from dsp_kernels.run.gpu.layout import GpuLayout
from dsp_kernels.tolerances import network_tolerance

HALF = (torch.float16, torch.bfloat16)
CHWN = GpuLayout.CHWN
FOUR = GroupStructure.uniform(16, 16, 4)
GROUPS = GroupStructure.build(64, 64, [(range(0, 64, 2), range(0, 40)), (range(3, 60), range(40, 64))])
# As in real networks: many thread blocks, tiles with more than 48 KB of shared memory, many turns.
REAL = (
    BlockCase("stage 1", ((FOUR, 3, 1), (FOUR, 3, 1)), batch=64, hw=(32, 32), tile=(8, 16, 1)),
    BlockCase(
        "stage 1 in turns", ((FOUR, 3, 1), (FOUR, 3, 1)), batch=64, hw=(32, 32), tile=(4, 16, 2), turns=8
    ),
    BlockCase("wide", ((GROUPS, 3, 1), (GROUPS, 3, 1)), batch=16, hw=(14, 14), tile=(3, 4, 1), turns=5),
    BlockCase(
        "wide with a shortcut",
        ((GROUPS, 3, 2), (GROUPS, 3, 1)),
        (GroupStructure.dense(64, 64), 1, 2),
        batch=24,
        hw=(28, 28),
        tile=(1, 5, 1),
    ),
)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [*CASES, *REAL], ids=[*IDS, *(case.name.replace(" ", "-") for case in REAL)])
def test_block(case: BlockCase, dtype: torch.dtype, gpu: torch.device) -> None:
    reason = why_no_blocks(dtype, gpu, CHWN)
    if reason:
        pytest.fail(reason)
    step = case.step(dtype)
    tables = block_tables(step, dtype, gpu)
    shape = case.batch, case.convs[0][0].in_channels, *case.hw
    out = step.output_shape(shape)
    shapes = {**dict.fromkeys(step.inputs, out), "x": shape}
    for member in step.members:
        shapes[member.output] = member.spec.output_shape(shapes[member.inputs[0]])
    chosen = BlockGeometry.of(step, tables.slots, case.hw, case.tile[:2], case.tile[2], case.turns)
    worth_measuring = block_options(step, shapes, limits_of(gpu)).values()
    for geometry in (chosen, *(other for part, other in worth_measuring if part is step)):
        assert geometry is not None
        for in_place in (False, True) if case.shortcut == "tensor" else (False,):
            check_block(CudaBlock(step, tables, geometry), case, dtype, gpu, in_place)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", nets.NAMES)
def test_networks_with_and_without_blocks(
    name: str, dtype: torch.dtype, gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nets.make(name).to(gpu)
    x = torch.randn(16, 3, 8, 8, device=gpu)
    answers = []
    for value in ("0", "1"):
        monkeypatch.setenv("DSP_KERNELS_BLOCKS", value)
        fused = dsp_kernels.fuse(model, x[:8], backend="cuda", dtype=dtype)
        answers.append(fused(x))
    bound = 2 * network_tolerance(dtype, 200, len(fused.program.steps))
    assert (answers[0] - answers[1]).abs().max() <= bound * answers[0].abs().max()
