"""Every GPU kernel against the definition in float64, on the one table of cases."""

from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch
from cases import CASES, IDS, Case
from gpu_checks import check_conv, layer_of

from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.run.gpu.conv import GPU_KERNELS
from dsp_kernels.run.gpu.cuda.conv import CudaConv
from dsp_kernels.run.gpu.cuda.kernels import kernels_for
from dsp_kernels.run.gpu.cuda.library import has_wgmma
from dsp_kernels.run.gpu.layout import BATCH_MULTIPLE, GPU_DTYPES, GpuLayout

# Shapes like those of real networks, with whole tiles and edges.
HALF = [(range(0, 64, 2), range(0, 40)), (range(3, 60), range(40, 64))]
REAL = (
    Case(
        "stage 1", GroupStructure.uniform(16, 16, 4), batch=8, hw=(32, 32), residual=True, activation="relu"
    ),
    Case("stage 3", GroupStructure.build(64, 64, HALF), batch=16, hw=(8, 8), activation="relu"),
    Case("wide 1x1", GroupStructure.uniform(256, 128, 2), kernel=1, padding=0, batch=8, hw=(14, 14)),
    Case("stage change", GroupStructure.build(64, 128, HALF), batch=24, hw=(28, 28), stride=2, residual=True),
    Case("batch 1", GroupStructure.build(64, 64, HALF), batch=1, hw=(56, 56), activation="relu"),
    Case("stem", GroupStructure.dense(3, 64), kernel=7, stride=2, padding=3, batch=8, hw=(65, 63)),
)


@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *REAL], ids=[*IDS, *(case.name.replace(" ", "-") for case in REAL)])
@pytest.mark.parametrize("family", ["triton", "cuda"])
def test_convolution(family: str, case: Case, dtype: torch.dtype, gpu: torch.device) -> None:
    """By the kernel that the rule chooses and by every CUDA kernel that can run it; also in place."""
    kernels = next(item for item in GPU_KERNELS if item.name == family)
    for layout in GpuLayout:
        able, reason = kernels.can_run(case.spec, dtype, gpu)
        if not able:
            pytest.skip(reason)
        prepare = [("rule", kernels.prepare)]
        if family == "cuda":
            names = kernels_for(layer_of(case, layout, dtype), has_wgmma(gpu))
            prepare += [(name, partial(CudaConv, kernel=name)) for name in names]
        fitting = replace(case, batch=8) if layout is GpuLayout.CHWN and case.batch % BATCH_MULTIPLE else case
        for (name, made), in_place in product(prepare, (False, True) if case.residual else (False,)):
            try:
                conv = made(layer_of(fitting, layout, dtype, gpu))
                check_conv(conv, fitting, dtype, layout, gpu, in_place)
            except AssertionError as error:
                error.add_note(f"kernel {name}, {layout.name}, in place {in_place}")
                raise
