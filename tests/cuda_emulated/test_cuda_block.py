"""The block kernel's own templates and tables, run on the host thread by thread, against the definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from block_cases import BACK, CASES, IDS, NARROW, SQUARE, BlockCase
from emulation import Emulator
from gpu_checks import check_block
from torch import Tensor

from dsp_kernels.errors import DSPShapeError
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock
from dsp_kernels.run.gpu.cuda.blocks.geometry import BlockGeometry
from dsp_kernels.run.gpu.cuda.blocks.tables import block_tables
from dsp_kernels.run.gpu.layout import GpuLayout

CHWN = GpuLayout.CHWN
BY_NAME = {case.name: case for case in CASES}


def prepared(case: BlockCase, dtype: torch.dtype, emulator: Emulator) -> CudaBlock:
    step = case.step(dtype)
    tables = block_tables(step, dtype, torch.device("cpu"))
    rows, columns, tile_n = case.tile
    geometry = BlockGeometry.of(step, tables.slots, case.hw, (rows, columns), tile_n, case.turns)
    assert geometry is not None
    return CudaBlock(step, tables, geometry, emulator)


def check(case: BlockCase, dtype: torch.dtype, emulator: Emulator, in_place: bool = False) -> None:
    check_block(prepared(case, dtype, emulator), case, dtype, in_place=in_place)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_block(case: BlockCase, block_emulator: Emulator) -> None:
    """Every access is in bounds, and no two threads use a word of shared memory without a barrier."""
    check(case, torch.float16, block_emulator)


@pytest.mark.parametrize("name", ["unequal groups, absent channels", "bottleneck with stride and shortcut"])
def test_bfloat16(name: str, block_emulator: Emulator) -> None:
    check(BY_NAME[name], torch.bfloat16, block_emulator)


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("name", ["stride 2, another residual", "bottleneck in turns"])
def test_copies_and_threads_in_any_order(name: str, late: bool, block_emulator: Emulator) -> None:
    """Asynchronous copies land at once or at the wait; threads run backwards; out is the residual."""
    block_emulator.late, block_emulator.backwards = late, True
    try:
        check(BY_NAME[name], torch.float16, block_emulator, in_place=True)
    finally:
        block_emulator.late = block_emulator.backwards = False


def test_few_bank_conflicts(block_emulator: Emulator) -> None:
    """ldmatrix, sums into the next map, the residual, rows kept for the next turn."""
    dense = GroupStructure.dense(16, 16)
    case = BlockCase("conflicts", ((dense, 3, 1), (dense, 3, 1)), hw=(4, 6), tile=(2, 6, 1), turns=2)
    check(case, torch.float16, block_emulator)
    counts = block_emulator.counts
    assert counts.matrices > 1000
    assert counts.matrix_conflicts == 0
    # Four chunks of one channel next to four of another may begin at the same bank.
    assert counts.load_conflicts <= counts.loads // 4
    assert counts.store_conflicts <= counts.stores // 10


def test_no_image_affects_another(block_emulator: Emulator) -> None:
    case = BlockCase("infinite", ((SQUARE, 3, 1), (SQUARE, 3, 1)), hw=(3, 4))
    block = prepared(case, torch.float16, block_emulator)
    x = case.input(torch.float16)
    x[1:] = torch.inf
    out = torch.empty(CHWN.shape(x.shape), dtype=x.dtype)
    block(CHWN.from_nchw(x), out)
    assert torch.isfinite(CHWN.as_nchw(out)[0]).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, out: (x[..., :4].contiguous(), out[..., :4].contiguous(), None), "multiple of 8"),
        (lambda x, out: (x[:, 1:].contiguous(), out, None), "x has shape"),
        (lambda x, out: (x, out[:, :, 1:].contiguous(), None), "out has shape"),
        (lambda x, out: (x.bfloat16(), out, None), "bfloat16"),
        (lambda x, out: (x.transpose(1, 2).contiguous().transpose(1, 2), out, None), "not contiguous"),
        (lambda x, out: (x, out, out), "takes no residual"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]],
    text: str,
    block_emulator: Emulator,
) -> None:
    case = BlockCase("bad", ((NARROW, 3, 1), (BACK, 3, 1)))
    block = prepared(case, torch.float16, block_emulator)
    x = CHWN.from_nchw(case.input(torch.float16))
    with pytest.raises(DSPShapeError, match=text):
        block(*change(x, torch.empty_like(x)))


def test_a_shortcut_that_reads_outside_the_tile_has_no_geometry() -> None:
    wide = BlockCase("far", ((NARROW, 3, 1), (BACK, 3, 1)), (GroupStructure.dense(7, 7), 7, 1))
    tables = block_tables(wide.step(torch.float16), torch.float16, torch.device("cpu"))
    assert BlockGeometry.of(tables.step, tables.slots, (8, 8), (4, 4), 1) is None
