"""The backends of one gather-grouped convolution."""

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
    """Arranges the weights once in a plan, (x, residual) -> y, which is called many times."""

    name: str

    def can_run(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> tuple[bool, str]:
        """Whether it runs this convolution on tensors of this dtype, device and layout; the reason if not."""
        ...

    def prepare(self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> ConvPlan:
        """weights[g]: (O_g, C_g, kh, kw), bias: (out_channels,) or None -> (x, residual) -> y."""
        ...


BACKENDS: Registry[ConvBackend] = Registry(
    "backend", *map(GpuBackend, GPU_KERNELS), CpuBackend(), EagerBackend()
)
