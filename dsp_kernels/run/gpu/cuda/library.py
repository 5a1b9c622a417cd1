"""The library of CUDA kernels, ``_C_cuda.so``: loaded at the first use of a kernel, or the reason why not."""

import ctypes
from functools import cache
from pathlib import Path

import torch

from dsp_kernels.run.gpu.cuda.launch import interface
from dsp_kernels.run.gpu.layout import why_not_on

LIBRARY = Path(__file__).resolve().parents[3] / "_C_cuda.so"
_FIX = (
    "with nvcc and a CUDA torch, run `pip install -v --no-build-isolation --force-reinstall --no-deps .` in "
    "the repository (DSP_KERNELS_CUDA=1 makes it fail where it cannot build them)"
)


@cache
def why_no_cuda() -> str:
    """Why the library cannot be used; empty once its ops are in torch.ops.dsp_kernels (loads it)."""
    if not LIBRARY.is_file():
        return f"the CUDA kernels are not built ({LIBRARY.name} is missing); {_FIX}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} does not load into torch {torch.__version__} ({error}); {_FIX}"
    return why_other_interface(LIBRARY)


def why_other_interface(library: Path) -> str:
    """Where the structs, enums and kernels of a library differ from Python's; empty if nowhere."""
    written = ctypes.CDLL(str(library)).dsp_kernels_interface
    written.restype = ctypes.c_char_p
    theirs, own = set(written().decode().splitlines()), set(interface().splitlines())
    if theirs == own:
        return ""
    return (
        f"{library.name} was built from other sources than dsp_kernels: it has {sorted(theirs - own)}, "
        f"not {sorted(own - theirs)}; {_FIX}"
    )


@cache
def has_wgmma(index: int | None) -> bool:
    """Whether CUDA device ``index`` (None: the current one) has wgmma and the library was compiled for it."""
    if why_no_cuda() or why_not_on(index) or torch.cuda.get_device_capability(index) != (9, 0):
        return False
    return bool(ctypes.CDLL(str(LIBRARY)).dsp_kernels_has_wgmma())
