"""PyTorch itself: eager, TorchScript and ``torch.compile``."""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPBackendError

from .base import Engine, Runner, converted


@dataclass(frozen=True)
class TorchEager(Engine):
    """The module as it is. layout: of weights and input; the input is converted in the timed call."""

    layout: torch.memory_format = torch.contiguous_format
    any_batch: bool = True

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        network = converted(model, self.dtype, self.layout)

        def run(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return network(x.to(self.dtype).contiguous(memory_format=self.layout)).float()

        return run


@dataclass(frozen=True)
class TorchScript(Engine):
    """Traced, as the authors ship their networks."""

    any_batch: bool = True

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer torch deprecates TorchScript
            traced = torch.jit.trace(copy.deepcopy(model).eval(), example, check_trace=False)

        def run(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return traced(x)

        for _ in range(3):  # the profiling executor specialises in its first calls: part of the build
            run(example)
        return run


@dataclass(frozen=True)
class TorchCompile(Engine):
    """``torch.compile`` for the example's shape, in channels_last: Inductor's best case.

    options: keyword arguments of ``torch.compile``. freezing: weights become constants (batch norms folded,
    weight layouts chosen at compile time), Inductor's fastest mode on a CPU.
    """

    options: dict[str, Any] = field(default_factory=dict)
    freezing: bool = False
    slow_build: bool = True

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        from torch._inductor import config, cpp_builder, exc

        try:
            cpp_builder.get_cpp_compiler()
        except (exc.InvalidCxxCompiler, RuntimeError) as error:
            raise DSPBackendError(f"Inductor finds no C++ compiler ({str(error)[:120]})") from error
        network = converted(model, self.dtype, torch.channels_last)
        compiled = torch.compile(_own_code(lambda x: network(x)), dynamic=False, **self.options)

        def run(x: Tensor) -> Tensor:
            with torch.no_grad():  # not inference mode, in which freezing is a no-op
                return compiled(x.to(self.dtype).contiguous(memory_format=torch.channels_last)).float()

        with config.patch(freezing=self.freezing):
            run(example)  # compiles now, so that the first sample does not contain it
        return run


def _own_code(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function with a code object of its own.

    ``torch.compile`` caches per code object. Without this the second engine that compiles a network silently
    gets the first one's code (measured: compile-freezing "built" in 1 s and ran unfrozen code).
    """
    code = function.__code__
    return FunctionType(code.replace(), function.__globals__, code.co_name, None, function.__closure__)
