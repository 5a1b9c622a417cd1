"""The executors of a whole Program."""

from typing import Protocol

import torch

from dsp_kernels.program.steps import Program, Runner
from dsp_kernels.run.cpu.program import CpuExecutor
from dsp_kernels.run.eager.program import EagerExecutor
from dsp_kernels.run.gpu.program import CudaExecutor
from dsp_kernels.run.registry import Registry


class Executor(Protocol):
    """Turns a Program once into a Runner, which is called many times, with any batch size."""

    name: str
    takes_any_dtype: bool  # whether inputs may have another floating dtype than the Program

    def can_run(self, program: Program, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """Whether it runs this Program on tensors of this dtype and device; the reason if not."""

    def prepare(self, program: Program) -> Runner:
        """The function; its tensors have any memory format, and the Program's dtype and device."""

    def is_native(self, program: Program) -> bool:
        """Whether a call of this Program involves no PyTorch operation."""

    def describe(self, program: Program, verbose: bool = False) -> list[str]:
        """How this executor runs each step; verbose: with what it launches for the example's batch."""


EXECUTORS = Registry[Executor](
    "backend", *map(CudaExecutor, ("cuda", "triton", "cudnn")), CpuExecutor(), EagerExecutor()
)
