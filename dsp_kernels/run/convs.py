"""The backends of one gather-grouped convolution.

A backend answers ``can_run(spec, dtype, device, layout) -> (bool, reason)`` and may answer ``is_worth`` for
the same request (registry.py). ``prepare`` arranges the weights once; the plan it returns, (x, residual) ->
y, is called many times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.cpu.conv import CpuBackend
from dsp_kernels.run.eager.conv import EagerBackend
from dsp_kernels.run.gpu.conv import GPU_KERNELS, GpuBackend
from dsp_kernels.run.registry import Registry

ConvPlan = Callable[[Tensor, Tensor | None], Tensor]


class ConvBackend(Protocol):
    """One implementation of the op."""

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
        """weights[g]: (O_g, C_g, kh, kw), bias: (out_channels,) or None -> (x, residual) -> y."""
        ...


BACKENDS: Registry[ConvBackend] = Registry("backend")
for _kernels in GPU_KERNELS:
    BACKENDS.register(GpuBackend(_kernels))
BACKENDS.register(CpuBackend())
BACKENDS.register(EagerBackend())
