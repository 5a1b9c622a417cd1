"""The Triton kernel as triton compiles it for sm_80, run by the PTX interpreter."""

import os
from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import CASES, IDS, Case
from child import Child
from gpu_checks import check_conv

from dsp_kernels.run.gpu.layout import GPU_DTYPES, GpuLayout

pytest.importorskip("triton")

# Compiling takes longer than running: a part of the table, unless every case is asked for.
TABLE = CASES if os.environ.get("DSP_TEST_ALL_ISAS") else CASES[:3] + CASES[17:19] + CASES[24:26]


def triton_case(case: Case) -> None:
    from dsp_kernels.run.gpu.triton.conv import TritonConv
    from triton_ptx import triton_on_host

    for dtype, layout in product(GPU_DTYPES, GpuLayout):
        batch = 8 if layout is GpuLayout.CHWN and case.batch % 8 else case.batch
        with triton_on_host() as ptx:
            check_conv(lambda *a: TritonConv(*a, layout), replace(case, batch=batch), dtype, layout)
        assert len(ptx.launches) == (batch > 0)


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name.replace(" ", "-"))
def test_triton(case: Case, child: Child) -> None:
    child(triton_case, case)
