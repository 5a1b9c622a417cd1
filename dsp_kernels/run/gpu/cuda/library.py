"""The library of CUDA kernels, ``_C_cuda.so``: loaded at the first use of a kernel, or the reason why not."""

import ctypes
from collections.abc import Sequence
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
        cuda, _ = built_for()
        theirs = set(built_from().splitlines())
    except (OSError, RuntimeError, AttributeError) as error:
        return f"{LIBRARY.name} does not load into torch {torch.__version__} ({error}); {_FIX}"
    if cuda.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"{LIBRARY.name} is of CUDA {cuda}, torch of CUDA {torch.version.cuda}; {_FIX}"
    own = set(interface().splitlines())
    if theirs == own:
        return ""
    return (
        f"{LIBRARY.name} was built from other sources than this package: it has {sorted(theirs - own)}, "
        f"not {sorted(own - theirs)}; {_FIX}"
    )


@cache
def built_for() -> tuple[str, tuple[str, ...]]:
    """The library's version of CUDA and its architectures: sm_80 (machine code), compute_80 (PTX), ..."""
    cuda, *archs = _text("dsp_kernels_build").split()
    return cuda, tuple(archs)


def built_from() -> str:
    """The library's ``interface``: the structs, enums, limits and kernels that it was compiled with."""
    return _text("dsp_kernels_interface")


def _text(function: str) -> str:
    write = getattr(ctypes.CDLL(str(LIBRARY)), function)
    write.restype = ctypes.c_char_p
    text: bytes = write()
    return text.decode()


@cache
def why_no_cuda_on(device: torch.device) -> str:
    """Why this device cannot run the library; empty if it can. Nothing is loaded for a CPU."""
    if device.type != "cuda":
        return f"tensors are on {device}"
    if reason := why_no_cuda() or why_not_on(device.index):
        return reason
    capability, archs = torch.cuda.get_device_capability(device), built_for()[1]
    if runs_on(capability, archs):
        return ""
    needed = f"{capability[0]}.{capability[1]}"
    return (
        f"{LIBRARY.name} was built for {', '.join(archs)}; {torch.cuda.get_device_name(device)} has compute "
        f"capability {needed}: rebuild on its machine or set TORCH_CUDA_ARCH_LIST={needed}; {_FIX}"
    )


def runs_on(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Whether a GPU runs code for one of these architectures.

    Machine code (sm_) runs on the same major version and the same or a later minor one, PTX (compute_) on all
    later GPUs, what ends in "a" on exactly that capability, what ends in "f" within the major version.

    >>> runs_on((8, 6), ["sm_80"]), runs_on((9, 0), ["sm_80"]), runs_on((10, 0), ["sm_90a", "compute_80"])
    (True, False, True)
    """

    def fits(arch: str) -> bool:
        kind, _, number = arch.partition("_")
        built = divmod(int(number.rstrip("af")), 10)
        if number.endswith("a"):
            return capability == built
        is_portable = kind == "compute" and not number.endswith("f")
        return capability >= built and (is_portable or capability[0] == built[0])

    return any(map(fits, archs))


@cache
def has_wgmma(device: torch.device) -> bool:
    """Whether this device has wgmma and the library was compiled for it."""
    if why_no_cuda_on(device) or torch.cuda.get_device_capability(device) != (9, 0):
        return False
    return "sm_90a" in built_for()[1]
