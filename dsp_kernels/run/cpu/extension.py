"""The native extension ``dsp_kernels._C``, or the reason why it is missing."""

import importlib
import os
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.op.activations import ACTIVATIONS, GATES

_FIX = (
    "install a C++ compiler and run `pip install -v --no-build-isolation --force-reinstall --no-deps .` in "
    "the repository (with -v it prints what it built, or why it could not)"
)


@cache
def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("dsp_kernels._C")
    except ImportError as error:
        return None, f"the native extension dsp_kernels._C is missing ({error}); to build it, {_FIX}"
    if set(getattr(module, "activations", ())) != {*ACTIVATIONS, *GATES}:
        return None, f"the native extension dsp_kernels._C is of another version: {_FIX}"
    return module, ""


def native() -> ModuleType | None:
    """The extension module, or None."""
    return _load()[0]


def why_missing() -> str:
    """Why ``native()`` is None and how to fix that; empty if it is not None."""
    return _load()[1]


def chosen_isa() -> str:
    """The instruction set named by DSP_KERNELS_ISA, else the best one of this CPU.

    Raises DSPBackendError if this CPU or this build lacks it.
    """
    module = native()
    assert module is not None
    available: list[str] = module.available_isas()
    wanted = os.environ.get("DSP_KERNELS_ISA", "")
    if wanted and wanted not in available:
        raise DSPBackendError(
            f"DSP_KERNELS_ISA is {wanted!r}; this CPU and this build have {', '.join(available)}"
        )
    return wanted or available[0]


def may_use_winograd() -> bool:
    """Whether convolutions may use Winograd's method, which rounds differently from a plain sum.

    DSP_KERNELS_WINOGRAD=0 turns it off.
    """
    return os.environ.get("DSP_KERNELS_WINOGRAD") != "0"


@cache
def cpu_fact(name: str) -> str:
    """What Linux says of the first core, as "vendor_id" or "model name"; empty elsewhere."""
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


# Vendors whose instructions for products of a dtype are not slower than float32, for which Winograd's method
# halves the products of 3x3 layers. Time in float32 / time in 16 bit, two threads, batch 1 / 8 / 32:
# bfloat16 on AMD Zen 4: ResNet-20 g=4 1.18 / 1.15 / 1.05, ResNet-56 g=4 1.25 / 1.14 / 1.01, ResNet-18 80 %
# 1.39 / 1.26 / 1.32; Zen 5 multiplies twice as many as in float32, too. On Intel Sapphire Rapids vdpbf16ps
# has half the rate of float32: ResNet-56 g=4 0.68 / 0.44 / 0.38. There float16: 1.24 / 1.29 / 1.07. AMX
# multiplies bfloat16 at 16 times the rate of float32 (one thread, 2,780 and 172 Gop/s).
_FAST_PRODUCTS = {
    torch.bfloat16: ("AuthenticAMD",),
    torch.float16: ("GenuineIntel",),
}


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """What convolutions multiply in a network of ``dtype``: the same on a CPU where it is fast, or float32.

    A rule, so that answers repeat; DSP_KERNELS_PRODUCTS=16bit or float32 overrides it. Raises
    DSPBackendError for another value.
    """
    module, wanted = native(), os.environ.get("DSP_KERNELS_PRODUCTS", "")
    if wanted not in ("", "16bit", "float32"):
        raise DSPBackendError(f"DSP_KERNELS_PRODUCTS is {wanted!r}; expected 16bit or float32")
    if module is None or dtype not in _FAST_PRODUCTS:
        return torch.float32
    own = str(dtype).removeprefix("torch.") in module.own_products(chosen_isa())
    fast = own and (by_matrices(chosen_isa(), dtype) or cpu_fact("vendor_id") in _FAST_PRODUCTS[dtype])
    return dtype if wanted == "16bit" or (fast and not wanted) else torch.float32


def by_matrices(isa: str, dtype: torch.dtype) -> bool:
    """Whether an instruction set multiplies matrices (AMX) of bfloat16 or int8."""
    return isa.endswith("_amx") and dtype in (torch.bfloat16, torch.int8)


def adds_in_half() -> bool:
    """Whether float16 networks accumulate products in float16."""
    module = native()
    own = module is not None and "float16" in module.own_products(chosen_isa())
    return own and product_dtype(torch.float16) == torch.float16


def new_network(dtype: torch.dtype = torch.float32) -> Any:
    """An empty native network for the chosen instruction set.

    dtype: of the network's weights; see ``product_dtype`` for what convolutions multiply.
    """
    module = native()
    assert module is not None
    precision = str(product_dtype(dtype)).removeprefix("torch.")
    return module.Network(chosen_isa(), precision, "where_faster" if may_use_winograd() else "never")


@cache
def warn_if_missing() -> None:
    """Warn once per process that networks run without the native extension."""
    if native() is None:
        warnings.warn(
            f"networks run in plain PyTorch, several times slower than they could: {why_missing()}",
            RuntimeWarning,
            stacklevel=3,
        )
