"""Ways to run one gather-grouped convolution; one file per way.

A backend answers ``can_run(spec, dtype, device, layout) -> (bool, reason)``, and may answer ``is_worth`` for
the same request (registry.py). It turns a spec and its weights into a plan once; the plan is a function
(x, residual) -> y and is called many times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.cpu.conv import CpuBackend
from dsp_kernels.run.eager.conv import EagerBackend
from dsp_kernels.run.gpu.conv import GpuBackend
from dsp_kernels.run.gpu.layout import GPU_KERNELS
from dsp_kernels.run.registry import Registry

__all__ = ["BACKENDS", "ConvBackend", "ConvPlan"]

ConvPlan = Callable[[Tensor, Tensor | None], Tensor]


class ConvBackend(Protocol):
    """One way to run the op."""

    name: str

    def can_run(
        self,
        spec: ConvSpec,
        dtype: torch.dtype,
        device: torch.device,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> tuple[bool, str]:
        """Whether it runs this convolution on tensors of this dtype, device and layout; the reason if not."""
        ...

    def prepare(self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> ConvPlan:
        """A function (x, residual) -> y with the weights arranged for this backend."""
        ...


BACKENDS: Registry[ConvBackend] = Registry("backend")
for _name in GPU_KERNELS.names():
    BACKENDS.register(GpuBackend(_name))
BACKENDS.register(CpuBackend())
BACKENDS.register(EagerBackend())
