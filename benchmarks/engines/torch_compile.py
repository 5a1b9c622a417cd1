"""``torch.compile`` in its modes. Compiled for the example's shape: Inductor's best case."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .base import Runner, cuda_available

__all__ = ["TorchCompile"]


@dataclass(frozen=True)
class TorchCompile:
    """options: keyword arguments of ``torch.compile``; channels_last, dtype: what it starts from.

    freezing makes constants of the weights (norms are then folded, weights laid out ahead of time); it is
    Inductor's inference mode and its fastest on a CPU.
    """

    name: str = "compile"
    options: dict[str, Any] = field(default_factory=dict)
    freezing: bool = False
    channels_last: bool = True
    device: str = "any"
    dtype: torch.dtype = torch.float32
    slow_build: bool = True
    any_batch: bool = False

    def available(self) -> tuple[bool, str]:
        """Where Inductor can build code: it needs a C++ compiler on a CPU, triton on a GPU."""
        from torch._inductor import cpp_builder, exc

        if self.device == "cuda" and not cuda_available()[0]:
            return cuda_available()
        try:
            cpp_builder.get_cpp_compiler()
        except (exc.InvalidCxxCompiler, RuntimeError) as error:
            return False, f"Inductor finds no C++ compiler ({' '.join(str(error).split())[:120]})"
        return True, ""

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """Compiles at once, so that the build time is not part of the first sample."""
        from torch._inductor import config

        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        network = copy.deepcopy(model).eval().to(self.dtype).to(memory_format=layout)
        compiled = torch.compile(_own_code(lambda x: network(x)), dynamic=False, **self.options)

        def run(x: Tensor) -> Tensor:
            # no_grad: freezing does nothing in inference mode.
            with torch.no_grad():
                return compiled(x.to(self.dtype).contiguous(memory_format=layout)).float()

        with config.patch(freezing=self.freezing):
            run(example)
        return run


def _own_code(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function with a code object of its own.

    Compiled code is kept per code object: without this, the second engine that compiles a network silently
    gets what the first one compiled (measured: compile-freezing "built" in 1 s and ran unfrozen code).
    """
    code = function.__code__
    return FunctionType(code.replace(), function.__globals__, code.co_name, None, function.__closure__)
