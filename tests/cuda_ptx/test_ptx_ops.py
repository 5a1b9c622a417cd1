"""The CUDA kernels as nvcc compiles them, run by the PTX interpreter, against the definition of the op."""

from collections.abc import Iterator
from itertools import product

import block_cases
import pytest
import torch
from block_cases import BlockCase
from cases import CASES, UNEQUAL, WIDE, Case
from child import Child
from ptx_checks import block_case, conv_case

from dsp_kernels import GroupStructure
from dsp_kernels.run.gpu.cuda.kernels import kernels_for
from dsp_kernels.run.gpu.layout import GPU_DTYPES, GpuLayout

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


def runs() -> Iterator[object]:
    for case, dtype, layout in product([*TABLE, *EDGES], GPU_DTYPES, GpuLayout):
        for kernel in kernels_for(case.spec, dtype, layout, wgmma=True):
            name = f"{kernel}-{case.name.replace(' ', '-')}-{str(dtype)[6:]}"
            yield pytest.param(case, dtype, kernel, id=name)


@pytest.mark.parametrize(("case", "dtype", "kernel"), list(runs()))
def test_convolution(case: Case, dtype: torch.dtype, kernel: str, child: Child) -> None:
    child(conv_case, case, dtype, kernel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", block_cases.CASES, ids=block_cases.IDS)
def test_block(case: BlockCase, dtype: torch.dtype, child: Child) -> None:
    child(block_case, case, dtype)
