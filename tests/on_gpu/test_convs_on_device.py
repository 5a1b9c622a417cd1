"""Every GPU kernel against the definition in float64, on the one table of cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import CASES, IDS, Case, reference

from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.run.gpu.conv import GPU_KERNELS
from dsp_kernels.run.gpu.cuda.conv import CudaConv
from dsp_kernels.run.gpu.cuda.kernels import KERNELS, kernels_for
from dsp_kernels.run.gpu.cuda.library import has_wgmma
from dsp_kernels.run.gpu.layout import BATCH_MULTIPLE, GPU_DTYPES, GpuLayout
from dsp_kernels.tolerances import op_tolerance

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


@pytest.mark.parametrize("layout", GpuLayout, ids=lambda layout: layout.name)
@pytest.mark.parametrize("dtype", GPU_DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *REAL], ids=[*IDS, *(case.name.replace(" ", "-") for case in REAL)])
@pytest.mark.parametrize("kernel", ["triton", "cuda", *KERNELS])
def test_convolution(
    kernel: str, case: Case, dtype: torch.dtype, layout: GpuLayout, device: torch.device
) -> None:
    """kernel: a family, whose rule chooses the kernel, or one of the CUDA kernels."""
    if layout is GpuLayout.CHWN and case.batch % BATCH_MULTIPLE:
        case = replace(case, batch=8)
    family = "cuda" if kernel in KERNELS else kernel
    kernels = next(item for item in GPU_KERNELS if item.name == family)
    able, reason = kernels.can_run(case.spec, dtype, device, layout)
    if not able:
        pytest.skip(reason)
    if kernel in KERNELS and kernel not in kernels_for(case.spec, dtype, layout, has_wgmma(device.index)):
        pytest.skip("not a kernel for this convolution on this device")
    arguments = case.tensors(dtype)
    expected = reference(case, arguments)
    weights = [weight.to(device) for weight in arguments.weights]
    bias = None if arguments.bias is None else arguments.bias.to(device)
    if kernel in KERNELS:
        conv = CudaConv(case.spec, weights, bias, layout, kernel=kernel)
    else:
        conv = kernels.prepare(case.spec, weights, bias, layout)
    x = layout.from_nchw(arguments.x.to(device))
    residual = None if arguments.residual is None else layout.from_nchw(arguments.residual.to(device))
    largest = expected.abs().max().item() if expected.numel() else 0.0
    bound = op_tolerance(dtype, case.reduction) * max(largest, 1.0)
    for in_place in (False, True) if residual is not None else (False,):
        out = torch.full(layout.shape(expected.shape), float("nan"), dtype=dtype, device=device)
        added = out.copy_(residual) if in_place and residual is not None else residual
        conv(x, out, added)
        error = (layout.as_nchw(out).cpu().double() - expected).abs()
        assert (error <= bound).all(), f"in place {in_place}: {error.max():.3g}"
