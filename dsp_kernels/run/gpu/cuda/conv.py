"""The CUDA C++ kernels as a family of GPU kernels: csrc/cuda launched on tensors in CHWN or NHWC."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dsp_kernels.errors import DSPShapeError
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.gpu.cuda.kernels import KERNELS, LARGEST_SIDE, kernels_for, rule
from dsp_kernels.run.gpu.cuda.launch import KERNEL_CODES, ConvSizes, describe, launch_op
from dsp_kernels.run.gpu.cuda.library import has_wgmma, why_no_cuda_on
from dsp_kernels.run.gpu.cuda.tables import Tables, make_tables
from dsp_kernels.run.gpu.layout import (
    BATCH_MULTIPLE,
    GPU_DTYPES,
    GpuConv,
    GpuLayer,
    GpuLayout,
)


class CudaKernels:
    """float16 and bfloat16 on tensor cores, float32 without; compute capability 8.0 or newer."""

    name = "cuda"

    def can_run(self, spec: ConvSpec, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """On such a GPU, if the kernels are built."""
        if dtype not in GPU_DTYPES:
            return False, f"dtype {dtype} is none of float16, bfloat16, float32"
        reach = max((k - 1) * d for k, d in zip(spec.kernel_size, spec.dilation, strict=True))
        if max(reach, *spec.padding) > LARGEST_SIDE:
            return False, f"its kernel or padding reaches farther than {LARGEST_SIDE} pixels"
        reason = self.why_not(device)
        return not reason, reason

    def why_not(self, device: torch.device) -> str:
        return why_no_cuda_on(device)

    def prepare(self, layer: GpuLayer) -> CudaConv:
        return CudaConv(layer)

    def options(self, layer: GpuLayer, shape: Sequence[int]) -> dict[str, Callable[[], GpuConv]]:
        """Every kernel that can run it; the rule's choice first."""
        names = kernels_for(layer, has_wgmma(layer.device))
        first = rule(names, layer.spec.structure, shape[0] * math.prod(layer.spec.output_hw(shape[2:])))
        return {
            f"{self.name} {name}": partial(CudaConv, layer, name)
            for name in sorted(names, key=lambda name: name != first)
        }


class CudaConv:
    """One convolution, its weights packed and its tables on the device.

    kernel: the only kernel of KERNELS to launch, instead of the one that the rule chooses.
    """

    def __init__(self, layer: GpuLayer, kernel: str | None = None) -> None:
        self._layer = layer
        self._tables: dict[str, Tables] = {}  # of the kernels that may be launched
        for name in (kernel,) if kernel else kernels_for(layer, wgmma=False):
            same = self._tables.get("nhwc") if name == "nhwc_sliced" else None
            self._tables[name] = same or make_tables(KERNELS[name], layer)

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """x, out, residual: see GpuConv. Raises DSPShapeError for tensors that do not fit."""
        shape = batch, channels, height, width = self._layer.check(x, out, residual)
        # The kernels count positions, and in CHWN pieces of 8 images, in 32 bits.
        positions = out.numel() // self._layer.spec.structure.out_channels
        pieces = x.numel() // BATCH_MULTIPLE if self._layer.layout is GpuLayout.CHWN else 0
        if max(height, width) > LARGEST_SIDE or max(pieces, positions + 64) >= 2**31:
            raise DSPShapeError(
                f"an input of {batch} images of {channels}x{height}x{width} is too large for the CUDA kernels"
            )
        if out.numel():
            tables, sizes = self._launch(shape)
            launch_op(x, out, residual, tables.weights, tables.bias, tables.table, sizes)

    def describe(self, shape: Sequence[int]) -> str:
        """The struct of a launch for an input (batch, channels, height, width)."""
        return describe(self._launch(shape)[1])

    def _launch(self, shape: Sequence[int]) -> tuple[Tables, ConvSizes]:
        batch, _, height, width = shape
        out_height, out_width = self._layer.spec.output_hw((height, width))
        name = rule(tuple(self._tables), self._layer.spec.structure, batch * out_height * out_width)
        tables, code = self._tables[name], KERNEL_CODES[name]
        return tables, tables.sizes._replace(
            kernel=code, batch=batch, height=height, width=width, out_height=out_height, out_width=out_width
        )
