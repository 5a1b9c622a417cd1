"""The Triton kernel as triton compiles it for sm_80, run by the PTX interpreter."""

import os

import pytest
import torch
from cases import CASES, Case
from child import Child

pytest.importorskip("triton")

from triton_ptx import triton_case

from dsp_kernels.run.gpu.layout import GPU_DTYPES, GpuLayout

# Compiling takes longer than running: a part of the table, unless every case is asked for.
TABLE = CASES if os.environ.get("DSP_TEST_ALL_ISAS") else (CASES[2], CASES[7], CASES[20], CASES[27])


@pytest.mark.parametrize("layout", GpuLayout, ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name.replace(" ", "-"))
def test_triton(case: Case, dtype: torch.dtype, layout: GpuLayout, child: Child) -> None:
    child(triton_case, case, dtype, layout)
