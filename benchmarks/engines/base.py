"""What every engine is: name, device and precision, whether it can run here, and how it is built."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Engine", "Runner", "cuda_available", "module_available"]

Runner = Callable[[Tensor], Tensor]


class Engine(Protocol):
    """A way of running a network.

    name: as in the table. device: "cpu", "cuda" or "any". dtype: in which it computes; the tolerance of the
    correctness gate comes from it. slow_build: whether building takes so long that the short default plan
    builds it at one batch size only. any_batch: whether what was built for one batch size runs any other as
    fast, so that it is built once.
    """

    @property
    def name(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def slow_build(self) -> bool: ...

    @property
    def any_batch(self) -> bool: ...

    def available(self) -> tuple[bool, str]:
        """Whether it can run on this machine; if not, why."""
        ...

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """A callable for inputs like ``example`` that gives what ``model`` gives in eval mode.

        example: (batch, channels, height, width). The callable takes and gives float32 tensors and may
        give the same memory again and again.
        """
        ...


def module_available(package: str, extra: str = "bench") -> tuple[bool, str]:
    """Whether a Python package can be imported; if not, how to get it."""
    try:
        importlib.import_module(package)
    except ImportError as error:
        hint = f": pip install 'dsp-kernels[{extra}]'" if extra else ""
        return False, f"the package {package} cannot be imported ({error}){hint}"
    return True, ""


def cuda_available() -> tuple[bool, str]:
    """Whether torch has a CUDA device."""
    if torch.version.cuda is None:
        return False, "this torch was built without CUDA"
    return (True, "") if torch.cuda.is_available() else (False, "torch finds no CUDA device")
