"""The native extension ``dsp_kernels._C``, or the reason why it is missing."""

import importlib
import os
import warnings
from functools import cache
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


def adds_in_half() -> bool:
    """Whether the chosen instruction set accumulates float16 products in float16."""
    module = native()
    return module is not None and "float16" in module.own_products(chosen_isa())


def new_network(dtype: torch.dtype = torch.float32) -> Any:
    """An empty native network for the chosen instruction set.

    dtype: float32, bfloat16 or float16, which convolutions multiply if the instruction set can.
    """
    module = native()
    assert module is not None
    precision = str(dtype).removeprefix("torch.")
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
