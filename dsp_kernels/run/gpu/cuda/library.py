"""The library of CUDA kernels, `_C_cuda`, loaded when a kernel is first asked for; or why there is none."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

__all__ = ["LIBRARY", "OLDEST_CAPABILITY", "has_wgmma", "why_no_cuda", "why_not_on"]

LIBRARY = Path(__file__).resolve().parents[3] / "_C_cuda.so"
# Asynchronous copies and bfloat16 on tensor cores came with it.
OLDEST_CAPABILITY = (8, 0)
_FIX = (
    "with nvcc and a CUDA torch, run `pip install -v --no-build-isolation --force-reinstall --no-deps .` in "
    "the repository (DSP_KERNELS_CUDA=1 makes it fail where it cannot build them)"
)


@cache
def why_no_cuda() -> str:
    """Empty if the kernels are loaded as torch.ops.dsp_kernels.cuda_conv, which the first call does."""
    if not LIBRARY.is_file():
        return f"the CUDA kernels are not built ({LIBRARY.name} is not there); {_FIX}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} does not load into torch {torch.__version__} ({error}); {_FIX}"
    return ""


@cache
def why_not_on(index: int | None) -> str:
    """Why CUDA device ``index`` (None: the current one) cannot run the kernels; empty if it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(index)} has compute capability {capability[0]}.{capability[1]}; "
            f"the CUDA kernels need {OLDEST_CAPABILITY[0]}.{OLDEST_CAPABILITY[1]} or newer"
        )
    return ""


@cache
def has_wgmma(index: int | None) -> bool:
    """Whether CUDA device ``index`` (None: the current one) has wgmma and the library was compiled for it."""
    if why_no_cuda() or why_not_on(index) or torch.cuda.get_device_capability(index) != (9, 0):
        return False
    return bool(ctypes.CDLL(str(LIBRARY)).dsp_kernels_has_wgmma())
