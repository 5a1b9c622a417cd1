"""The CUDA kernels' own templates and tables, run on the host thread by thread, against the definition."""

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import block_cases
import pytest
import torch
from block_cases import BACK, NARROW, SQUARE, BlockCase
from cases import CASES, UNEQUAL, WIDE, Case
from emulation import LEAST_SHARED, Emulator
from gpu_checks import check_block, check_conv
from torch import Tensor

from dsp_kernels import GroupStructure
from dsp_kernels.errors import DSPShapeError
from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock
from dsp_kernels.run.gpu.cuda.blocks.geometry import BlockGeometry
from dsp_kernels.run.gpu.cuda.blocks.tables import block_tables
from dsp_kernels.run.gpu.cuda.conv import CudaConv, CudaKernels
from dsp_kernels.run.gpu.cuda.kernels import KERNELS, kernels_for
from dsp_kernels.run.gpu.layout import ACTIVATION_CODES, GPU_DTYPES, GpuLayout

CHWN, NHWC = GpuLayout.CHWN, GpuLayout.NHWC
CPU = torch.device("cpu")
# Strides of NCHW inputs do not reach the kernels.
TABLE = [case for case in CASES if not (case.channels_last or case.sliced)]
# Edges of the kernels: tiles of filters, steps of the reduction, blocks of positions.
EDGES = (
    Case("more filters than a tile", GroupStructure.dense(17, 70), hw=(4, 5)),
    Case(
        "a filter more than a tile, an input more than a step",
        GroupStructure.build(40, 50, [(range(33), range(0, 34, 2)), (range(7, 24), range(1, 50, 2))]),
        hw=(5, 6),
        residual=True,
        activation="relu",
    ),
    Case("more than one block of positions", UNEQUAL, hw=(13, 11)),
    Case("more pixels than a halo tile", WIDE, hw=(19, 18), residual=True, activation="relu"),
    Case("depthwise, more channels than a tile", GroupStructure.uniform(40, 40, 40), hw=(5, 5)),
    Case(
        "aligned runs out of order",
        GroupStructure.build(
            24, 24, [([16, 3, *range(8, 16)], [1, *range(16, 24)]), ([0, 2, 9], range(15, 7, -1))]
        ),
        residual=True,
    ),
)
MODES = {"early": (False, False), "late": (True, False), "late-backwards": (True, True)}


def layout_of(kernel: str) -> GpuLayout:
    return NHWC if "nhwc" in kernel else CHWN


def in_chwn(case: Case) -> Case:
    batch = 8 if case.batch in (1, 2) else case.batch // 8 * 8 + 8 * (case.batch > 0)
    return replace(case, batch=batch)


def check(case: Case, dtype: torch.dtype, kernel: str, emulator: Emulator, in_place: bool = False) -> None:
    layout = layout_of(kernel)
    case = in_chwn(case) if layout is CHWN else case
    emulator.launches.clear()
    check_conv(lambda *a: CudaConv(*a, layout, emulator, kernel), case, dtype, layout, in_place=in_place)
    assert emulator.launches == ([KERNELS[kernel].number] if case.batch else [])


def runs() -> Iterator[object]:
    """Every case with every kernel that can run it; a second batch in CHWN where no halo kernel can."""
    for case, dtype, layout in product([*TABLE, *EDGES], GPU_DTYPES, GpuLayout):
        names = kernels_for(case.spec, dtype, layout, wgmma=True)
        for kernel in names:
            batches = [case.batch]
            if kernel in ("chwn", "fp32_chwn") and "halo" not in names and case.batch:
                batches.append(16)
            for batch in batches:
                name = f"{kernel}-{case.name.replace(' ', '-')}-{str(dtype)[6:]}-{batch}"
                yield pytest.param(replace(case, batch=batch), dtype, kernel, id=name)


@pytest.mark.parametrize(("case", "dtype", "kernel"), list(runs()))
def test_convolution(case: Case, dtype: torch.dtype, kernel: str, emulator: Emulator) -> None:
    check(case, dtype, kernel, emulator)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_stage_is_read_or_overwritten_too_early(kernel: str, mode: str, emulator: Emulator) -> None:
    """Asynchronous copies land at once or at the wait; threads run in both orders; out is the residual."""
    case = Case("many steps", GroupStructure.dense(70, 20), hw=(4, 4), residual=True, activation="relu")
    emulator.late, emulator.backwards = MODES[mode]
    check(case, torch.float32 if "fp32" in kernel else torch.float16, kernel, emulator, in_place=True)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if "fp32" not in name])
def test_every_filter_tile_without_bank_conflicts(kernel: str, emulator: Emulator) -> None:
    seen = set()
    for filters in (9, 30, 64, 128):
        case = Case("conflicts", GroupStructure.dense(16, filters), hw=(4, 8), batch=16, residual=True)
        weights = case.tensors(torch.float16).weights
        conv = CudaConv(case.spec, weights, None, layout_of(kernel), emulator, kernel)
        seen.add(conv.tables(torch.float16, CPU)[kernel].filters)
        check(case, torch.float16, kernel, emulator)
        counts = emulator.counts
        assert (counts.matrices > 0) == ("wgmma" not in kernel)  # wgmma reads shared memory itself
        assert counts.matrix_conflicts == 0
        assert counts.load_conflicts == 0
        assert counts.store_conflicts == 0
        # In a halo a quarter warp may cross from one channel to the next, which starts at another bank.
        assert counts.copy_conflicts <= (counts.copies // 50 if kernel == "halo" else 0)
    assert seen == set(KERNELS[kernel].filters)


def test_halo_tiles_fit_the_smallest_chip(emulator: Emulator) -> None:
    emulator.shared_limit = LEAST_SHARED
    case = Case("small chip", GroupStructure.dense(20, 12), hw=(17, 16), batch=16)
    check(case, torch.bfloat16, "halo", emulator)


def test_no_image_affects_another(emulator: Emulator) -> None:
    """Padding rows of the reduction are zeros in shared memory, not inputs times a weight of zero."""
    case = Case("infinite", GroupStructure.dense(3, 5), batch=8, hw=(5, 5))
    arguments = case.tensors(torch.float16)
    arguments.x[1:] = torch.inf
    for layout in GpuLayout:
        conv = CudaConv(case.spec, arguments.weights, arguments.bias, layout, emulator)
        out = arguments.x.new_empty(layout.shape((8, 5, 5, 5)))
        conv(layout.from_nchw(arguments.x), out)
        assert torch.isfinite(layout.as_nchw(out)[0]).all()


@pytest.mark.parametrize(
    ("layout", "change", "text"),
    [
        (NHWC, lambda x, out: (x[..., :6].contiguous(), out), "x has shape"),
        (NHWC, lambda x, out: (x, out[:, :, :, :-1]), "out has shape"),
        (NHWC, lambda x, out: (x.half(), out), "x is torch.float16"),
        (NHWC, lambda x, out: (x.transpose(1, 2), out), "not contiguous"),
        (NHWC, lambda x, out: (x[0], out), "4 dimensions"),
        (CHWN, lambda x, out: (x, out), "multiple of 8"),
    ],
)
def test_tensors_that_do_not_fit(
    layout: GpuLayout,
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    text: str,
    emulator: Emulator,
) -> None:
    case = Case("bad", UNEQUAL, batch=4, hw=(6, 6))
    arguments = case.tensors()
    conv = CudaConv(case.spec, arguments.weights, arguments.bias, layout, emulator)
    x, out = change(layout.from_nchw(arguments.x), torch.empty(layout.shape((4, 9, 6, 6))))
    with pytest.raises(DSPShapeError, match=text):
        conv(x, out)


DENSE, FOUR = GroupStructure.dense(64, 64), GroupStructure.uniform(64, 64, 4)


@pytest.mark.parametrize(
    ("structure", "kernel", "batch", "hw", "expected"),
    [
        (DENSE, 3, 256, (56, 56), "halo"),
        (DENSE, 3, 8, (7, 7), "chwn"),  # too few blocks for the halo kernel
        (FOUR, 1, 256, (28, 28), "chwn"),
        (FOUR, 3, 256, (28, 28), "halo"),
        (DENSE, 3, 3, (56, 56), "nhwc"),
        (DENSE, 3, 1, (7, 7), "nhwc_sliced"),
    ],
)
def test_which_kernel_is_launched_where_nothing_is_measured(
    structure: GroupStructure, kernel: int, batch: int, hw: tuple[int, int], expected: str
) -> None:
    case = Case("rule", structure, kernel=kernel, padding=kernel // 2)
    launched: list[int] = []
    weights, layout = case.tensors(torch.float16).weights, layout_of(expected)
    conv = CudaConv(case.spec, weights, None, layout, lambda *a: launched.append(a[-1][0]))
    x = torch.empty(layout.shape((batch, structure.in_channels, *hw)), dtype=torch.float16)
    conv(x, torch.empty(layout.shape((batch, structure.out_channels, *hw)), dtype=torch.float16))
    assert launched == [KERNELS[expected].number]
    options = CudaKernels().options(case.spec, weights, None, layout, (batch, structure.in_channels, *hw))
    assert next(iter(options)) == f"cuda {expected}"
    assert len(options) == len(kernels_for(case.spec, torch.float16, layout, wgmma=False))


@pytest.mark.parametrize(
    ("enum", "numbers"),
    [("Kernel", {name: kind.number for name, kind in KERNELS.items()}), ("Activation", ACTIVATION_CODES)],
)
def test_numbers_agree_with_the_enums_of_csrc(enum: str, numbers: dict[str, int]) -> None:
    headers = (Path(__file__).resolve().parents[2] / "csrc" / "cuda").glob("*.h")
    text = "".join(header.read_text() for header in headers)
    names = re.search(rf"enum class {enum} {{([^}}]*)}}", text)
    assert names
    assert names[1].replace(" ", "").split(",") == sorted(numbers, key=lambda name: numbers[name])
    assert set(numbers.values()) == set(range(len(numbers)))


BY_NAME = {case.name: case for case in block_cases.CASES}


def prepared(case: BlockCase, dtype: torch.dtype, emulator: Emulator) -> CudaBlock:
    step = case.step(dtype)
    tables = block_tables(step, dtype, CPU)
    rows, columns, tile_n = case.tile
    geometry = BlockGeometry.of(step, tables.slots, case.hw, (rows, columns), tile_n, case.turns)
    assert geometry is not None
    return CudaBlock(step, tables, geometry, emulator)


def check_prepared(case: BlockCase, dtype: torch.dtype, emulator: Emulator, in_place: bool = False) -> None:
    check_block(prepared(case, dtype, emulator), case, dtype, in_place=in_place)


@pytest.mark.parametrize("case", block_cases.CASES, ids=block_cases.IDS)
def test_block(case: BlockCase, block_emulator: Emulator) -> None:
    """Every access is in bounds, and no two threads use a word of shared memory without a barrier."""
    check_prepared(case, torch.float16, block_emulator)


@pytest.mark.parametrize("name", ["unequal groups, absent channels", "strided bottleneck"])
def test_block_in_bfloat16(name: str, block_emulator: Emulator) -> None:
    check_prepared(BY_NAME[name], torch.bfloat16, block_emulator)


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize("name", ["stride 2, another residual", "bottleneck in turns"])
def test_copies_and_threads_of_a_block_in_any_order(name: str, late: bool, block_emulator: Emulator) -> None:
    """Asynchronous copies land at once or at the wait; threads run backwards; out is the residual."""
    block_emulator.late, block_emulator.backwards = late, True
    check_prepared(BY_NAME[name], torch.float16, block_emulator, in_place=True)


def test_blocks_have_few_bank_conflicts(block_emulator: Emulator) -> None:
    """ldmatrix, sums into the next map, the residual, rows kept for the next turn."""
    dense = GroupStructure.dense(16, 16)
    case = BlockCase("conflicts", ((dense, 3, 1), (dense, 3, 1)), hw=(4, 6), tile=(2, 6, 1), turns=2)
    check_prepared(case, torch.float16, block_emulator)
    counts = block_emulator.counts
    assert counts.matrices > 1000
    assert counts.matrix_conflicts == 0
    # Four chunks of one channel next to four of another may begin at the same bank.
    assert counts.load_conflicts <= counts.loads // 4
    assert counts.store_conflicts <= counts.stores // 10


def test_no_image_affects_another_in_a_block(block_emulator: Emulator) -> None:
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
def test_tensors_that_do_not_fit_a_block(
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
    tables = block_tables(wide.step(torch.float16), torch.float16, CPU)
    assert BlockGeometry.of(tables.step, tables.slots, (8, 8), (4, 4), 1) is None
