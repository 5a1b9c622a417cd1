"""Every family of GPU kernels against the definition in float64, on the one table of cases."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, IDS, Case, reference

import dsp_kernels.run.convs  # noqa: F401  (registers the kernels)
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.run.gpu.cuda import conv as cuda
from dsp_kernels.run.gpu.cuda.library import has_wgmma
from dsp_kernels.run.gpu.layout import GPU_KERNELS, GpuLayout, layout_for_batch
from dsp_kernels.tolerances import op_tolerance

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Kernels that only large layers get, made to take the small ones too: (family, blocks to fill, wgmma).
KERNELS = {
    "triton": ("triton", None, None),
    "cuda": ("cuda", None, None),
    "cuda-gemm": ("cuda", 1 << 30, "0"),
    "cuda-halo": ("cuda", 0, "0"),
    "cuda-wgmma": ("cuda", 1 << 30, "1"),
    "cuda-wgmma-halo": ("cuda", 0, "1"),
}

# Shapes like those of real networks, where whole tiles and their edges both occur.
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


def batches(case: Case) -> list[Case]:
    """The case as it is, and with a batch that CHWN can hold."""
    if case.batch == 0:
        return []
    wide = Case(**{**case.__dict__, "batch": 8})
    return [case] if layout_for_batch(case.batch) is GpuLayout.CHWN else [case, wide]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *REAL], ids=[*IDS, *(case.name.replace(" ", "-") for case in REAL)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_convolution(
    kernel: str, case: Case, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, few_blocks, wgmma = KERNELS[kernel]
    kernels = next(item for item in GPU_KERNELS if item.name == family)
    if few_blocks is not None:
        if dtype == torch.float32:
            pytest.skip("float32 has one kernel")
        monkeypatch.setattr(cuda, "_FEW_BLOCKS", few_blocks)
    if wgmma is not None:
        monkeypatch.setenv("DSP_KERNELS_WGMMA", wgmma)
    if wgmma == "1" and not (device.type == "cuda" and has_wgmma(device.index)):
        pytest.skip("needs compute capability 9.0 and a library with sm_90a in it")
    for one in batches(case):
        arguments = one.tensors(dtype)
        expected = reference(one, arguments)
        for layout in GpuLayout:
            if layout is GpuLayout.CHWN and layout_for_batch(one.batch) is not layout:
                continue
            able, reason = kernels.can_run(one.spec, dtype, device, layout)
            if not able:
                pytest.skip(reason)
            bias = None if arguments.bias is None else arguments.bias.to(device)
            conv = kernels.prepare(one.spec, [w.to(device) for w in arguments.weights], bias, layout)
            x = layout.from_nchw(arguments.x.to(device))
            residual = None
            if arguments.residual is not None:
                residual = layout.from_nchw(arguments.residual.to(device))
            bound = op_tolerance(dtype, one.reduction) * max(expected.abs().max().item(), 1.0)
            for in_place in (False, True) if residual is not None else (False,):
                out = torch.full(layout.shape(expected.shape), float("nan"), dtype=dtype, device=device)
                read = residual
                if in_place and residual is not None:
                    read = out.copy_(residual)
                conv(x, out, read)
                error = (layout.as_nchw(out).cpu().double() - expected).abs().max().item()
                assert error <= bound, f"{one.batch} images, {layout.name}, in place {in_place}: {error:.3g}"
