"""The CUDA C++ kernels as a family of GPU kernels: csrc/cuda launched on tensors in CHWN or NHWC."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
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
    GpuLayout,
    check_conv_operands,
)


class CudaKernels:
    """float16 and bfloat16 on tensor cores, float32 without; compute capability 8.0 or newer."""

    name = "cuda"

    def can_run(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: GpuLayout
    ) -> tuple[bool, str]:
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

    def prepare(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None, layout: GpuLayout
    ) -> CudaConv:
        return CudaConv(spec, weights, bias, layout)

    def options(
        self,
        spec: ConvSpec,
        weights: Sequence[Tensor],
        bias: Tensor | None,
        layout: GpuLayout,
        shape: Sequence[int],
    ) -> dict[str, Callable[[], GpuConv]]:
        """Every kernel that can run it; the rule's choice first."""
        if not weights:
            return {self.name: partial(CudaConv, spec, weights, bias, layout)}
        names = kernels_for(spec, weights[0].dtype, layout, has_wgmma(weights[0].device))
        positions = shape[0] * math.prod(spec.output_hw(shape[2:]))
        first = rule(names, spec.structure, positions)
        return {
            f"{self.name} {name}": partial(CudaConv, spec, weights, bias, layout, kernel=name)
            for name in sorted(names, key=lambda name: name != first)
        }


class CudaConv:
    """One convolution, its weights packed and its tables on the device.

    kernel: the only kernel of KERNELS to launch, instead of the one that the rule chooses.
    """

    def __init__(
        self,
        spec: ConvSpec,
        weights: Sequence[Tensor],
        bias: Tensor | None,
        layout: GpuLayout,
        kernel: str | None = None,
    ) -> None:
        spec.check_constants(weights, bias)
        self.spec, self.layout = spec, layout
        self._kernel = kernel
        constant = next(iter(weights), bias)
        # Without constants, dtype and device are those of each input.
        self._kind = None if constant is None else (constant.dtype, constant.device)
        self._tables: dict[tuple[torch.dtype, torch.device], dict[str, Tables]] = {}
        if self._kind:
            self._tables[self._kind] = self._arrange(weights, bias, *self._kind)

    def tables(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tables]:
        """By name, the tables of the kernels that may be launched."""
        key = dtype, device
        if key not in self._tables:
            self._tables[key] = self._arrange((), None, dtype, device)
        return self._tables[key]

    def _arrange(
        self, weights: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tables]:
        if dtype not in GPU_DTYPES:
            raise DSPShapeError(f"dtype {dtype} is none of float16, bfloat16, float32")
        names = kernels_for(self.spec, dtype, self.layout, wgmma=False)
        made: dict[str, Tables] = {}
        for name in names if self._kernel is None else (self._kernel,):
            if name == "nhwc_sliced" and "nhwc" in made:
                sizes = made["nhwc"].sizes._replace(kernel=KERNEL_CODES[name])
                made[name] = replace(made["nhwc"], sizes=sizes)
            else:
                made[name] = make_tables(KERNELS[name], self.spec, weights, bias, dtype, device)
        return made

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """x, out, residual: see GpuConv. Raises DSPShapeError for tensors that do not fit."""
        spec = self.spec
        dtype, device = self._kind or (x.dtype, x.device)
        shape = check_conv_operands(spec, self.layout, x, out, residual, dtype, device)
        batch, channels, height, width = shape
        positions = out.numel() // spec.structure.out_channels
        # The kernels count positions, and in CHWN pieces of 8 images, in 32 bits.
        pieces = x.numel() // BATCH_MULTIPLE if self.layout is GpuLayout.CHWN else 0
        if max(height, width) > LARGEST_SIDE or max(pieces, positions + 64) >= 2**31:
            raise DSPShapeError(
                f"an input of {batch} images of {channels}x{height}x{width} is too large for the CUDA kernels"
            )
        if out.numel() == 0:
            return
        tables, sizes = self._sizes(shape, dtype, device)
        launch_op(x, out, residual, tables.weights, tables.bias, tables.table, sizes)

    def describe(self, shape: Sequence[int]) -> str:
        """The struct of a launch for an input (batch, channels, height, width); empty without constants."""
        return describe(self._sizes(shape, *self._kind)[1]) if self._kind else ""

    def _sizes(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> tuple[Tables, ConvSizes]:
        kept = self.tables(dtype, device)
        batch, _, height, width = shape
        out_height, out_width = self.spec.output_hw((height, width))
        positions = batch * out_height * out_width
        tables = kept[self._kernel or rule(tuple(kept), self.spec.structure, positions)]
        return tables, tables.sizes._replace(
            batch=batch, height=height, width=width, out_height=out_height, out_width=out_width
        )
