"""Convolutions and blocks whose kernels run as PTX in tools/ptx, against the definition."""

from dataclasses import replace
from itertools import product

import torch
from block_cases import BlockCase
from cases import Case
from gpu_checks import check_block, check_conv
from ptx.interpreter import Interpreter

from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock
from dsp_kernels.run.gpu.cuda.blocks.geometry import BlockGeometry
from dsp_kernels.run.gpu.cuda.blocks.tables import block_tables
from dsp_kernels.run.gpu.cuda.conv import CudaConv
from dsp_kernels.run.gpu.layout import GpuLayout

CPU = torch.device("cpu")
CHIPS = ("sm_80", "sm_90a")


def layout_of(kernel: str) -> GpuLayout:
    return GpuLayout.NHWC if "nhwc" in kernel else GpuLayout.CHWN


def conv_case(
    case: Case, dtype: torch.dtype, kernel: str, chips: tuple[str, ...] = CHIPS, in_place: bool = False
) -> None:
    """Every order of warps, copies and blocks on every chip that has the kernel."""
    layout = layout_of(kernel)
    if layout is GpuLayout.CHWN:
        batch = 8 if case.batch in (1, 2) else case.batch // 8 * 8 + 8 * (case.batch > 0)
        case = replace(case, batch=batch)
    for chip, order in product(chips, Interpreter.ORDERS):
        if chip != "sm_90a" and "wgmma" in kernel:
            continue
        with Interpreter(chip, **Interpreter.ORDERS[order]) as ptx:
            check_conv(lambda *a: CudaConv(*a, layout, kernel=kernel), case, dtype, layout, in_place=in_place)
        assert len(ptx.launches) == (case.batch > 0)


def prepared_block(case: BlockCase, dtype: torch.dtype) -> CudaBlock:
    step = case.step(dtype)
    tables = block_tables(step, dtype, CPU)
    rows, columns, tile_n = case.tile
    geometry = BlockGeometry.of(step, tables.slots, case.hw, (rows, columns), tile_n, case.turns)
    assert geometry is not None
    return CudaBlock(step, tables, geometry)


def block_case(case: BlockCase, dtype: torch.dtype, in_place: bool = False) -> None:
    block = prepared_block(case, dtype)
    for chip, order in product(CHIPS, Interpreter.ORDERS):
        with Interpreter(chip, **Interpreter.ORDERS[order]) as ptx:
            check_block(block, case, dtype, in_place=in_place)
        assert len(ptx.launches) == 1
