"""What every engine has: a name, a device, a precision, whether it can run here, and how it is built."""

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Engine:
    """One way of running a network; subclasses implement ``prepare``.

    name: as shown in tables. dtype: of the arithmetic; the tolerance of the correctness check depends on it.
    device: "cpu", "cuda" or "any". slow_build: ``--short`` builds it for one batch size only. any_batch: what
    is built for one batch size runs any other as fast, so it is built once.
    """

    name: str
    dtype: torch.dtype = torch.float32
    device: str = "any"
    slow_build: bool = False
    any_batch: bool = False

    def available(self) -> tuple[bool, str]:
        """Whether the engine can run on this machine; if not, why."""
        return cuda_available() if self.device == "cuda" else (True, "")

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """A callable that computes what ``model`` computes in eval mode for inputs like ``example``.

        example: (batch, channels, height, width), float32. The callable takes and returns float32 tensors;
        it may return the same memory at every call. ``model`` is not modified.
        """
        raise NotImplementedError


def converted(model: nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> nn.Module:
    """A copy in eval mode with this precision and memory format."""
    return copy.deepcopy(model).eval().to(dtype).to(memory_format=layout)


def module_available(*packages: str, hint: str = ": pip install 'dsp-kernels[bench]'") -> tuple[bool, str]:
    """Whether all these Python packages can be imported; if not, how to get the first that is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            return False, f"the package {package} cannot be imported ({error}){hint}"
    return True, ""


def cuda_available() -> tuple[bool, str]:
    """Whether torch has a CUDA device; if not, why."""
    if torch.version.cuda is None:
        return False, "this torch was built without CUDA"
    return (True, "") if torch.cuda.is_available() else (False, "torch finds no CUDA device")
