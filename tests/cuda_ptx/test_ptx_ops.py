"""The CUDA kernels as nvcc compiles them, run by the PTX interpreter, against the definition of the op."""

import re
from collections.abc import Iterator
from functools import partial
from itertools import product

import block_cases
import pytest
import torch
from block_cases import BlockCase
from cases import CASES, UNEQUAL, WIDE, Case
from child import Child
from gpu_checks import layer_of
from ptx.interpreter import SHARED_BYTES
from ptx_checks import block_case, conv_case, infinite_images, kernels_of, refused_block

from dsp_kernels import GroupStructure
from dsp_kernels.run.gpu.cuda.kernels import KERNELS, kernels_for
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
        for kernel in kernels_for(layer_of(case, layout, dtype), wgmma=True):
            name = f"{kernel}-{case.name.replace(' ', '-')}-{str(dtype)[6:]}"
            yield pytest.param(case, dtype, kernel, id=name)


@pytest.mark.parametrize(("case", "dtype", "kernel"), list(runs()))
def test_convolution(case: Case, dtype: torch.dtype, kernel: str, child: Child) -> None:
    child(conv_case, case, dtype, kernel)


STAGES = Case("many steps", GroupStructure.dense(70, 20), hw=(4, 4), residual=True, activation="relu")


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_stage_is_read_or_overwritten_too_early(kernel: str, child: Child) -> None:
    """Asynchronous copies land early or late, warps run in any order; out is the residual."""
    dtype = torch.float32 if "fp32" in kernel else torch.float16
    child(partial(conv_case, in_place=True), STAGES, dtype, kernel)


def test_every_kernel_of_the_library_is_launched(child: Child) -> None:
    """With every size of tile; the library holds each for both 16-bit dtypes."""
    ran = set()
    for kernel, filters in product(KERNELS, (9, 30, 64, 128)):
        case = Case("tiles", GroupStructure.dense(16, filters), hw=(4, 8), batch=16, residual=True)
        for dtype in (torch.float32,) if "fp32" in kernel else GPU_DTYPES[:2]:
            ran |= child(conv_case, case, dtype, kernel, ["sm_90a"])
    for case, dtype in product((block_cases.CASES[0], block_cases.CASES[13]), GPU_DTYPES[:2]):
        ran |= child(block_case, case, dtype, ["sm_90a"])
    assert ran == child(kernels_of, "sm_90a")


def test_halo_tiles_fit_the_smallest_chip(child: Child) -> None:
    case = Case("small chip", GroupStructure.dense(20, 12), hw=(17, 16), batch=16)
    child(partial(conv_case, shared_limit=SHARED_BYTES["sm_86"]), case, torch.bfloat16, "halo")


@pytest.mark.parametrize("kernel", [name for name in KERNELS if "fp32" not in name])
def test_no_image_affects_another(kernel: str, child: Child) -> None:
    """Padding rows of the reduction are zeros in shared memory, not inputs times a weight of zero."""
    child(infinite_images, kernel)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("case", block_cases.CASES, ids=block_cases.IDS)
def test_block(case: BlockCase, dtype: torch.dtype, child: Child) -> None:
    child(block_case, case, dtype)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("conv_count", 0, "number of convolutions"),
        ("conv_count", 4, "number of convolutions"),
        ("batch", 4, "not a multiple of 8"),
        ("tile_n", 0, "turns or images"),
        ("turns", 0, "turns or images"),
        ("columns", 0, "a tile is too large .* or empty"),
        ("rows", 4096, "a tile is too large .* or empty"),
        ("offset", -1024, "outside the shared memory"),
        ("slots", 10**6, "outside the shared memory"),
    ],
)
def test_a_launch_that_would_leave_its_memory_is_refused(
    name: str, value: int, says: str, child: Child
) -> None:
    assert re.search(says, child(refused_block, block_cases.CASES[0], name, value))


@pytest.mark.parametrize("name", ["stride 2, another residual", "bottleneck in turns"])
def test_the_output_of_a_block_may_be_its_residual(name: str, child: Child) -> None:
    case = next(case for case in block_cases.CASES if case.name == name)
    child(partial(block_case, in_place=True), case, torch.float16)
