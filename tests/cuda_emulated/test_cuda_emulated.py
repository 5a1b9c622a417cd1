"""The CUDA kernels' own templates and tables, run on the host thread by thread, against the definition."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from cases import CASES, UNEQUAL, WIDE, Case, reference
from emulation import LEAST_SHARED, MOST_SHARED, Emulator

from dsp_kernels import GroupStructure
from dsp_kernels.errors import DSPShapeError
from dsp_kernels.run.gpu.cuda import conv as cuda
from dsp_kernels.run.gpu.cuda.conv import CudaConv
from dsp_kernels.run.gpu.layout import GpuLayout
from dsp_kernels.tolerances import op_tolerance

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The emulation does not care how NCHW lies in memory.
TABLE = [case for case in CASES if not (case.channels_last or case.sliced)]
# Shapes on which the kernels' own edges lie: tiles of filters, blocks of the reduction, blocks of positions.
EDGES = (
    Case("more filters than a tile", GroupStructure.dense(17, 70), hw=(4, 5)),
    Case(
        "a filter more than a tile, an input more than a block",
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


def check(
    case: Case, dtype: torch.dtype, layout: GpuLayout, emulator: Emulator, in_place: bool = False
) -> None:
    arguments = case.tensors(dtype)
    conv = CudaConv(case.spec, arguments.weights, arguments.bias, layout, emulator)
    expected = reference(case, arguments)
    x = layout.from_nchw(arguments.x)
    residual = None if arguments.residual is None else layout.from_nchw(arguments.residual)
    out = x.new_full(layout.shape(expected.shape), torch.nan)
    if in_place and residual is not None:
        out = residual
    conv(x, out, residual)
    y = layout.as_nchw(out).double()
    assert torch.isfinite(y).all(), "an output was not written"
    if y.numel():
        error = (y - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= op_tolerance(dtype, case.reduction), f"relative error {error:.2e}"


NUMBERS = {"gemm": 0, "halo": 1, "wgmma": 5, "wgmma-halo": 6}


@pytest.fixture(params=NUMBERS)
def chwn_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every kernel, for small inputs too; "halo" and "wgmma-halo" where they can run."""
    return only(request.param, monkeypatch)


def only(kernel: str, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cuda, "_FEW_BLOCKS", 0 if "halo" in kernel else 10**9)
    monkeypatch.setattr(cuda, "_can_use_wgmma", lambda device: True)
    monkeypatch.setenv("DSP_KERNELS_WGMMA", "1" if "wgmma" in kernel else "0")
    return kernel


def in_chwn(case: Case) -> Case:
    return dataclasses.replace(
        case, batch=8 if case.batch in (1, 2) else case.batch // 8 * 8 + 8 * (case.batch > 0)
    )


@pytest.mark.parametrize(
    ("dtype", "sliced"),
    [(dtype, sliced) for dtype in DTYPES for sliced in (False, True) if dtype != torch.float32 or not sliced],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("case", [*TABLE, *EDGES], ids=lambda case: case.name.replace(" ", "-"))
def test_nhwc(
    case: Case, dtype: torch.dtype, sliced: bool, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_FEW_BLOCKS", 10**9 if sliced else 0)
    emulator.launches.clear()
    check(case, dtype, GpuLayout.NHWC, emulator)
    number = 4 if dtype == torch.float32 else 7 if sliced else 2
    assert emulator.launches == ([] if case.batch == 0 else [number])


def chwn_runs() -> Iterator[tuple[Case, torch.dtype, str]]:
    """Every case with every kernel that takes it; with a second batch where that is one only."""
    for case, dtype in product([*TABLE, *EDGES], DTYPES):
        case, spec = in_chwn(case), case.spec
        plain = spec.kernel_size == (3, 3) and spec.stride == spec.dilation == (1, 1)
        half = dtype != torch.float32
        yield case, dtype, "gemm"
        if half:
            yield case, dtype, "wgmma"
        if half and plain:
            yield case, dtype, "halo"
            yield case, dtype, "wgmma-halo"
        elif case.batch:
            yield dataclasses.replace(case, name=f"{case.name} 16", batch=16), dtype, "gemm"


@pytest.mark.parametrize(
    ("case", "dtype", "kernel"),
    [
        pytest.param(case, dtype, kernel, id=f"{kernel}-{case.name.replace(' ', '-')}-{str(dtype)[6:]}")
        for case, dtype, kernel in chwn_runs()
    ],
)
def test_chwn(
    case: Case, dtype: torch.dtype, kernel: str, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(kernel, monkeypatch)
    emulator.launches.clear()
    check(case, dtype, GpuLayout.CHWN, emulator)
    assert emulator.launches == (
        [] if case.batch == 0 else [3 if dtype == torch.float32 else NUMBERS[kernel]]
    )


@pytest.fixture(params=MODES, ids=str)
def mode(request: pytest.FixtureRequest, emulator: Emulator) -> Iterator[str]:
    """When asynchronous copies land, and in which order threads run between two barriers."""
    emulator.late, emulator.backwards = MODES[request.param]
    yield request.param
    emulator.late = emulator.backwards = False


MANY_BLOCKS = Case("many blocks", GroupStructure.dense(70, 20), hw=(4, 4), residual=True, activation="relu")


@pytest.mark.parametrize("layout", GpuLayout, ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=lambda d: str(d)[6:])
def test_no_stage_is_read_or_overwritten_too_early(
    dtype: torch.dtype, layout: GpuLayout, mode: str, chwn_kernel: str, emulator: Emulator
) -> None:
    case = in_chwn(MANY_BLOCKS) if layout == GpuLayout.CHWN else MANY_BLOCKS
    check(case, dtype, layout, emulator, in_place=True)


@pytest.mark.parametrize("layout", GpuLayout, ids=lambda layout: layout.name)
def test_every_filter_tile_without_bank_conflicts(
    layout: GpuLayout, chwn_kernel: str, emulator: Emulator
) -> None:
    """16, 32 and 64 filters per tile; ldmatrix, asynchronous copies, fragments and sums."""
    seen = set()
    wgmma = "wgmma" in chwn_kernel and layout == GpuLayout.CHWN  # reads shared memory by itself
    for filters in (9, 30, 64, 128):
        case = Case("conflicts", GroupStructure.dense(16, filters), hw=(4, 8), batch=16, residual=True)
        conv = CudaConv(case.spec, case.tensors(torch.float16).weights, None, layout, emulator)
        kept = conv._tables(torch.float16, torch.device("cpu"))
        seen |= {tables.filters for name, tables in kept.items() if ("wgmma" in name) == wgmma}
        check(case, torch.float16, layout, emulator)
        counts = emulator.counts
        assert (counts.matrices > 0) == (not wgmma)
        assert counts.matrix_conflicts == 0
        assert counts.load_conflicts == 0
        assert counts.store_conflicts == 0
        # In a halo a quarter warp may cross from one channel to the next, which starts at another bank.
        assert counts.copy_conflicts <= (counts.copies // 50 if chwn_kernel == "halo" else 0)
    everywhere = {16, 32, 64} if layout == GpuLayout.CHWN else {16, 32}
    assert seen == ({64, 128} if wgmma else everywhere)


def test_halo_tiles_fit_the_smallest_chip(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_FEW_BLOCKS", 0)
    emulator.shared_limit = LEAST_SHARED
    try:
        case = Case("small chip", GroupStructure.dense(20, 12), hw=(17, 16), batch=16)
        check(case, torch.bfloat16, GpuLayout.CHWN, emulator)
    finally:
        emulator.shared_limit = MOST_SHARED


def test_other_images_do_not_reach_an_output(emulator: Emulator) -> None:
    """Rows that only fill up a block are zeros in shared memory, not numbers of x times a weight of zero."""
    case = Case("infinite", GroupStructure.dense(3, 5), batch=8, hw=(5, 5))
    arguments = case.tensors(torch.float16)
    arguments.x[1:] = torch.inf
    for layout in GpuLayout:
        conv = CudaConv(case.spec, arguments.weights, arguments.bias, layout, emulator)
        out = arguments.x.new_empty(layout.shape((8, 5, 5, 5)))
        conv(layout.from_nchw(arguments.x), out)
        assert torch.isfinite(layout.as_nchw(out)[0]).all()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, out: (x[..., :6].contiguous(), out), "expected 7"),
        (lambda x, out: (x, out[:, :, :, :-1]), "out has shape"),
        (lambda x, out: (x.half(), out), "x is torch.float16"),
        (lambda x, out: (x.transpose(1, 2), out), "not contiguous"),
        (lambda x, out: (x[0], out), "4 dimensions"),
    ],
)
def test_tensors_that_do_not_fit(
    change: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
    text: str,
    emulator: Emulator,
) -> None:
    case = Case("bad", UNEQUAL, hw=(6, 6))
    arguments = case.tensors()
    conv = CudaConv(case.spec, arguments.weights, arguments.bias, GpuLayout.NHWC, emulator)
    x, out = GpuLayout.NHWC.from_nchw(arguments.x), torch.empty(2, 6, 6, 9)
    x, out = change(x, out)
    with pytest.raises(DSPShapeError, match=text):
        conv(x, out)


def test_chwn_needs_batches_of_eight(emulator: Emulator) -> None:
    case = Case("bad", UNEQUAL, batch=4, hw=(6, 6))
    arguments = case.tensors()
    conv = CudaConv(case.spec, arguments.weights, arguments.bias, GpuLayout.CHWN, emulator)
    with pytest.raises(DSPShapeError, match="multiple of 8"):
        conv(GpuLayout.CHWN.from_nchw(arguments.x), torch.empty(9, 6, 6, 4))


@pytest.mark.parametrize(
    ("structure", "kernel", "batch", "hw", "asked", "expected"),
    [
        (GroupStructure.dense(64, 64), 3, 256, (56, 56), None, "wgmma_halo"),
        (GroupStructure.dense(64, 64), 3, 256, (56, 56), False, "halo"),
        (GroupStructure.dense(64, 64), 3, 8, (7, 7), None, "chwn"),  # too few blocks for either halo kernel
        (GroupStructure.dense(64, 64), 3, 8, (7, 7), True, "wgmma"),
        (GroupStructure.dense(64, 128), 1, 256, (28, 28), None, "wgmma"),
        (GroupStructure.dense(64, 128), 1, 256, (28, 28), False, "chwn"),
        (GroupStructure.uniform(64, 64, 4), 1, 256, (28, 28), None, "chwn"),  # 16 of 64 filters
        (GroupStructure.uniform(64, 64, 4), 3, 256, (28, 28), None, "halo"),
        (GroupStructure.dense(64, 40), 1, 256, (28, 28), None, "wgmma"),  # 40 of 64 against 48 of 48
    ],
)
def test_where_wgmma_is_used(
    structure: GroupStructure,
    kernel: int,
    batch: int,
    hw: tuple[int, int],
    asked: bool | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "_can_use_wgmma", lambda device: True)
    case = Case("rule", structure, kernel=kernel, padding=kernel // 2)
    launched: list[int] = []

    def launch(*arguments: object) -> None:
        sizes = arguments[-1]
        assert isinstance(sizes, list)
        launched.append(sizes[0])

    weights = case.tensors(torch.float16).weights
    conv = CudaConv(case.spec, weights, None, GpuLayout.CHWN, launch, wgmma=asked)
    x = torch.empty(GpuLayout.CHWN.shape((batch, structure.in_channels, *hw)), dtype=torch.float16)
    conv(x, torch.empty(GpuLayout.CHWN.shape((batch, structure.out_channels, *hw)), dtype=torch.float16))
    assert launched == [cuda.KERNELS[expected].number]


def test_wgmma_only_where_the_chip_has_it() -> None:
    """On the CPU, and on anything but sm_90, its tables are not even made."""
    case = Case("rule", GroupStructure.dense(64, 64))
    conv = CudaConv(case.spec, case.tensors(torch.float16).weights, None, GpuLayout.CHWN, wgmma=True)
    assert set(conv._tables(torch.float16, torch.device("cpu"))) == {"halo", "chwn"}
