"""The Triton kernel in Triton's interpreter against the definition in float64, written over NaN."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, ONE_TO_ONE, UNEQUAL, WIDE, Arguments, Case, reference
from torch import Tensor

pytest.importorskip("triton")

from dsp_kernels import GroupStructure
from dsp_kernels.backends.gpu_layout import GpuLayout
from dsp_kernels.backends.triton import TritonConv
from dsp_kernels.tolerances import op_tolerance

CHWN, NHWC = GpuLayout.CHWN, GpuLayout.NHWC
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32

# Channels in aligned runs of 8, so that NHWC takes its 16-byte form on both sides.
RUNS = GroupStructure.build(
    32,
    24,
    [([*range(8, 16), *range(24, 32)], range(16, 24)), (range(8), range(8))],
)
EXTRA = (
    Case("runs of 8 channels", RUNS, hw=(5, 4), residual=True),
    Case("runs of 8 channels, 1x1", RUNS, kernel=1, padding=0, hw=(3, 4)),
    Case("more channels than lie together", GroupStructure.dense(72, 8), hw=(3, 3)),
    Case("more filters than a tile", GroupStructure.build(3, 40, [([2, 0], range(1, 40))]), hw=(3, 2)),
    Case("padding 2", UNEQUAL, padding=2, hw=(3, 4)),
    Case(
        "dilation and stride", WIDE, dilation=(1, 3), stride=2, padding=(0, 3), hw=(5, 6), activation="relu"
    ),
)
TABLE = [case for case in (*CASES, *EXTRA) if case.batch]
# What differs in 16 bits is how numbers are read, multiplied and rounded, not which; a part of the table.
SOME = [
    case
    for case in TABLE
    if case in EXTRA or case.structure in (ONE_TO_ONE, WIDE) or "residual" in case.name or "no " in case.name
]


def run(case: Case, a: Arguments, layout: GpuLayout, *, in_place: bool = False) -> Tensor:
    """The answer as (batch, channels, height, width), written over NaN or over the residual itself."""
    conv = TritonConv(case.spec, a.weights, a.bias, layout)
    residual = None if a.residual is None else layout.from_nchw(a.residual)
    shape = (case.batch, case.structure.out_channels, *case.spec.output_hw(case.hw))
    out = torch.full(layout.shape(shape), torch.nan, dtype=a.x.dtype)
    if in_place:
        assert residual is not None
        out = residual
    conv(layout.from_nchw(a.x), out, residual)
    return layout.as_nchw(out)


def check(case: Case, layout: GpuLayout, dtype: torch.dtype, *, in_place: bool = False) -> None:
    if layout is CHWN:
        case = replace(case, batch=8)
    a = case.tensors(dtype)
    y, expected = run(case, a, layout, in_place=in_place), reference(case, a)
    assert y.shape == expected.shape
    assert not y.isnan().any()
    error = (y.double() - expected).abs().max().item()
    assert error <= op_tolerance(dtype, case.reduction) * max(expected.abs().max().item(), 1.0)


@pytest.mark.parametrize("layout", [CHWN, NHWC], ids=lambda layout: layout.name)
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_float32(case: Case, layout: GpuLayout) -> None:
    check(case, layout, SINGLE)


@pytest.mark.parametrize("dtype", [HALF, BRAIN], ids=str)
@pytest.mark.parametrize("layout", [CHWN, NHWC], ids=lambda layout: layout.name)
@pytest.mark.parametrize("case", SOME, ids=lambda case: case.name)
def test_16_bits(case: Case, layout: GpuLayout, dtype: torch.dtype) -> None:
    check(case, layout, dtype)
