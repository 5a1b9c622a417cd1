"""A residual block as one launch of a CUDA kernel (csrc/cuda/block_kernel.cuh): CHWN, 16-bit numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsp_kernels.errors import DSPShapeError
from dsp_kernels.run.gpu.cuda.blocks.geometry import BlockGeometry
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep
from dsp_kernels.run.gpu.cuda.blocks.tables import BlockTables
from dsp_kernels.run.gpu.cuda.launch import describe, launch_op
from dsp_kernels.run.gpu.cuda.library import why_no_cuda_on
from dsp_kernels.run.gpu.layout import BATCH_MULTIPLE, GpuLayout, check_operands


def why_no_blocks(dtype: torch.dtype, device: torch.device, layout: GpuLayout) -> str:
    """Why no block can run as one kernel; empty if blocks can."""
    if layout is not GpuLayout.CHWN:
        return f"the batch is not a multiple of {BATCH_MULTIPLE}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"dtype {dtype} is neither float16 nor bfloat16"
    return why_no_cuda_on(device)


class CudaBlock:
    """A GpuConv that runs one block for one input size."""

    def __init__(self, step: BlockStep, tables: BlockTables, geometry: BlockGeometry) -> None:
        self.step, self.tables, self.geometry = step, tables, geometry
        self._table, self._sizes = geometry.table(tables, tables.weights.device)

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """x, out, residual: contiguous in CHWN; all of out is overwritten; it may be the residual, but not x.

        residual: given exactly if the step has two inputs. Raises DSPShapeError for tensors that do not fit.
        """
        if (residual is None) != (len(self.step.inputs) == 1):
            wants = "a" if residual is None else "no"
            raise DSPShapeError(f"the block {self.step.output} takes {wants} residual besides x")
        weights, source = self.tables.weights, self.geometry.regions[0]
        kind, channels = (weights.dtype, weights.device), self.step.convs[0].spec.structure.in_channels
        operands, output_shape = (x, out, residual), self.step.output_shape
        if x.shape[1:3] != (source.height, source.width):
            raise DSPShapeError(f"x has shape {tuple(x.shape)}; this is for {source.height}x{source.width}")
        batch, *_ = check_operands(operands, GpuLayout.CHWN, kind, channels, output_shape)
        # The kernel counts pieces of 8 images in 32 bits.
        if max(x.numel(), out.numel()) // BATCH_MULTIPLE >= 2**31:
            raise DSPShapeError(f"an input of shape {tuple(x.shape)} is too large for the block kernel")
        if out.numel() == 0:
            return
        sizes = self._sizes._replace(batch=batch)
        launch_op(x, out, residual, weights, self.tables.bias, self._table, sizes)

    def describe(self, shape: Sequence[int]) -> str:
        """The struct of a launch for an input (batch, channels, height, width)."""
        return describe(self._sizes._replace(batch=shape[0]))
