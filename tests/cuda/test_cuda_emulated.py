"""The CUDA kernels' own templates and tables, run on the host thread by thread, against the definition."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from cases import CASES, UNEQUAL, WIDE, Case, reference
from emulation import LEAST_SHARED, MOST_SHARED, Emulator

from dsp_kernels import GroupStructure
from dsp_kernels.backends import cuda
from dsp_kernels.backends.cuda import CudaConv
from dsp_kernels.backends.gpu_layout import GpuLayout
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


def check(case: Case, dtype: torch.dtype, layout: GpuLayout, emulator: Emulator, in_place: bool = False) -> None:
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


@pytest.fixture(params=("gemm", "halo"))
def chwn_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both kernels for small inputs too."""
    monkeypatch.setattr(cuda, "_FEW_BLOCKS", 0 if request.param == "halo" else 10**9)
    return request.param


def in_chwn(case: Case) -> Case:
    return dataclasses.replace(case, batch=8 if case.batch in (1, 2) else case.batch // 8 * 8 + 8 * (case.batch > 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [*TABLE, *EDGES], ids=lambda case: case.name.replace(" ", "-"))
def test_nhwc(case: Case, dtype: torch.dtype, emulator: Emulator) -> None:
    check(case, dtype, GpuLayout.NHWC, emulator)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [*TABLE, *EDGES], ids=lambda case: case.name.replace(" ", "-"))
def test_chwn(case: Case, dtype: torch.dtype, chwn_kernel: str, emulator: Emulator) -> None:
    case = in_chwn(case)
    eligible = (
        dtype != torch.float32 and case.spec.kernel_size == (3, 3) and case.spec.stride == case.spec.dilation == (1, 1)
    )
    if chwn_kernel == "halo" and not eligible:
        case = dataclasses.replace(case, batch=16)  # has one kernel; another batch instead
    emulator.kernels.clear()
    check(case, dtype, GpuLayout.CHWN, emulator)
    if eligible and emulator.kernels:
        assert emulator.kernels == [1 if chwn_kernel == "halo" else 0]
