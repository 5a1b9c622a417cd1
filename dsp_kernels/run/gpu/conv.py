"""The op on ordinary tensors (NCHW or channels_last) by a family of GPU kernels.

The kernels have their own layouts. A channels_last tensor already is NHWC; a contiguous one is converted at
both ends, which a fused network (``dsp_kernels.fuse``) pays for once instead of per layer.
"""

import warnings
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.op.spec import ConvSpec, memory_format_of
from dsp_kernels.run.gpu.cuda.conv import CudaKernels
from dsp_kernels.run.gpu.graphs import is_capturing
from dsp_kernels.run.gpu.layout import GpuConv, GpuKernels, GpuLayer, GpuLayout, layout_for_batch
from dsp_kernels.run.gpu.triton.conv import TritonKernels
from dsp_kernels.run.registry import Registry

# In the order of preference where nothing is measured.
GPU_KERNELS: Registry[GpuKernels] = Registry("GPU kernel", CudaKernels(), TritonKernels())


@cache
def warn_of_missing(device: torch.device) -> None:
    """One warning per GPU: which kernels cannot run there, why, the cure, and what runs instead."""
    missing, instead = [], "PyTorch's own convolutions"
    for kernels in GPU_KERNELS:
        reason = kernels.why_not(device)
        if not reason:
            instead = kernels.name
            break
        missing.append(f"{kernels.name}: {reason}")
    if missing:
        warnings.warn(f"dsp_kernels uses {instead} on {device}; {'; '.join(missing)}", stacklevel=2)


# What graphs of the caller read: when such a graph is freed is not known, so these are not.
_captured: set[GpuConv] = set()


class GpuBackend:
    """One family of GPU kernels as a backend of the op."""

    def __init__(self, kernels: GpuKernels) -> None:
        self.name = kernels.name
        self._kernels = kernels

    def can_run(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> tuple[bool, str]:
        """The batch of each call decides between the layouts of the kernels."""
        return self._kernels.can_run(spec, dtype, device)

    def is_worth(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> tuple[bool, str]:
        """Not on the CPU, where Triton only interprets its kernel."""
        return (True, "") if device.type == "cuda" else (False, f"tensors are on {device}")

    def prepare(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """A function (x, residual) -> y; see ``ConvBackend.prepare``. Weights are arranged at first use."""
        # Without constants, dtype and device are those of each input.
        prepared: dict[tuple[GpuLayout, torch.dtype, torch.device], GpuConv] = {}

        def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
            memory_format = memory_format_of(x)
            channels_last = memory_format == torch.channels_last
            layout = GpuLayout.NHWC if channels_last else layout_for_batch(x.shape[0])
            capturing = is_capturing(x.device)
            key = layout, x.dtype, x.device
            if key not in prepared:
                if capturing:
                    raise DSPBackendError(
                        "a convolution cannot arrange its weights while a CUDA graph is captured; call the "
                        f"network once before, with an input like {tuple(x.shape)}"
                    )
                prepared[key] = self._kernels.prepare(GpuLayer(spec, weights, bias, *key))
                if x.is_cuda:  # the next call may be on another stream, which does not wait for this one
                    torch.cuda.current_stream(x.device).synchronize()
            if capturing:
                _captured.add(prepared[key])
            out = torch.empty(layout.shape(spec.output_shape(x.shape)), dtype=x.dtype, device=x.device)
            added = None if residual is None else layout.from_nchw(residual)
            prepared[key](layout.from_nchw(x), out, added)
            return layout.as_nchw(out).contiguous(memory_format=memory_format)

        return run
