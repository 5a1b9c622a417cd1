"""The op on ordinary tensors (NCHW or channels_last) by a family of GPU kernels.

The kernels read and write their own layouts. A channels_last tensor is one of them already; a plain one is
converted at both ends, which a whole network fused (``dsp_kernels.fuse``) pays for once instead of per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec, memory_format_of
from dsp_kernels.run.gpu.cuda.conv import CudaKernels
from dsp_kernels.run.gpu.layout import GPU_KERNELS, GpuConv, GpuKernels, GpuLayout, layout_for_batch
from dsp_kernels.run.gpu.triton.conv import TritonKernels

__all__ = ["GpuBackend"]

# In this order of preference; neither was timed yet.
GPU_KERNELS.register(CudaKernels())
GPU_KERNELS.register(TritonKernels())


class GpuBackend:
    """One entry of GPU_KERNELS as a backend of the op. See the module's text."""

    def __init__(self, name: str) -> None:
        self.name = name

    def can_run(
        self,
        spec: ConvSpec,
        dtype: torch.dtype,
        device: torch.device,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> tuple[bool, str]:
        """Where the kernels run both layouts: the batch decides between them at the call."""
        for each in (GpuLayout.NHWC, GpuLayout.CHWN):
            able, reason = self._kernels().can_run(spec, dtype, device, each)
            if not able:
                return False, reason
        return True, ""

    def is_worth(
        self,
        spec: ConvSpec,
        dtype: torch.dtype,
        device: torch.device,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> tuple[bool, str]:
        """Not on the CPU, where such kernels are only interpreted."""
        return (True, "") if device.type == "cuda" else (False, f"tensors are on {device}")

    def prepare(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """A function (x, residual) -> y; see ``ConvBackend.prepare``. Weights are arranged at first use."""
        kernels = self._kernels()
        prepared: dict[GpuLayout, GpuConv] = {}

        def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
            memory_format = memory_format_of(x)
            channels_last = memory_format == torch.channels_last
            layout = GpuLayout.NHWC if channels_last else layout_for_batch(x.shape[0])
            if layout not in prepared:
                prepared[layout] = kernels.prepare(spec, weights, bias, layout)
            shape = (x.shape[0], spec.structure.out_channels, *spec.output_hw(x.shape[2:]))
            out = torch.empty(layout.shape(shape), dtype=x.dtype, device=x.device)
            added = None if residual is None else layout.from_nchw(residual)
            prepared[layout](layout.from_nchw(x), out, added)
            return layout.as_nchw(out).contiguous(memory_format=memory_format)

        return run

    def _kernels(self) -> GpuKernels:
        return next(kernels for kernels in GPU_KERNELS if kernels.name == self.name)
