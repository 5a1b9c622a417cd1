"""The block kernel's own templates and tables, run on the host thread by thread, against the definition."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from block_cases import CASES, IDS, BlockCase, reference
from block_emulation import BlockEmulator

from dsp_kernels.backends.cuda_block import CudaBlock
from dsp_kernels.backends.cuda_block_geometry import BlockGeometry
from dsp_kernels.backends.cuda_block_tables import block_tables
from dsp_kernels.backends.gpu_layout import GpuLayout
from dsp_kernels.tolerances import network_tolerance

FOLDER = Path(__file__).resolve().parent / "emulator"
CHWN = GpuLayout.CHWN


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> BlockEmulator:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the emulation with")
    library = tmp_path_factory.mktemp("emulator") / "block_emulator.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(FOLDER / "block_emulator.cpp"), "-o", str(library)], check=True)
    return BlockEmulator(library)


def prepared(case: BlockCase, dtype: torch.dtype, emulator: BlockEmulator) -> CudaBlock:
    step = case.step(dtype)
    tables = block_tables(step, dtype, torch.device("cpu"))
    rows, columns, tile_n = case.tile
    geometry = BlockGeometry.of(step, tables.slots, case.hw, (rows, columns), tile_n, case.turns)
    assert geometry is not None
    return CudaBlock(step, tables, geometry, emulator)


def check(case: BlockCase, dtype: torch.dtype, emulator: BlockEmulator, in_place: bool = False) -> None:
    block = prepared(case, dtype, emulator)
    x = case.input(dtype)
    residual = None
    shape = block.step.output_shape(x.shape)
    if case.shortcut == "tensor":
        residual = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = reference(block.step, x, residual)
    there = None if residual is None else CHWN.from_nchw(residual)
    out = there if in_place and there is not None else torch.full(CHWN.shape(shape), torch.nan, dtype=dtype)
    block(CHWN.from_nchw(x), out, there)
    y = CHWN.as_nchw(out).double()
    assert torch.isfinite(y).all(), "an output was not written, or shared memory was read before it was"
    error = (y - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= network_tolerance(dtype, case.reduction, len(block.step.members)), f"error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_block(case: BlockCase, dtype: torch.dtype, emulator: BlockEmulator) -> None:
    """Every access is in bounds, and no two threads use a word of shared memory without a barrier."""
    check(case, dtype, emulator)
