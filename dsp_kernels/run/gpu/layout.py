"""What every way of running one convolution on a GPU agrees on: tensor layouts and the call of a launcher.

A gather costs nothing where a channel is a plane (CHWN: the batch innermost), and little where a pixel's
channels lie together (NHWC). A whole network stays in one of the two from its first convolution to its pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import Group, GroupStructure
from dsp_kernels.run.registry import Registry

__all__ = ["GPU_KERNELS", "GpuConv", "GpuKernels", "GpuLayout", "all_groups", "layout_for_batch"]

# 16-byte accesses of 16-bit numbers along the batch.
BATCH_MULTIPLE = 8


class GpuLayout(Enum):
    """How a value (batch, channels, height, width) lies in memory; always contiguous in this order."""

    CHWN = (1, 2, 3, 0)
    NHWC = (0, 2, 3, 1)

    def shape(self, nchw: Sequence[int]) -> tuple[int, ...]:
        """The shape in this layout of a value of shape (batch, channels, height, width)."""
        return tuple(nchw[axis] for axis in self.value)

    def from_nchw(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width), any strides -> contiguous in this layout."""
        return x.permute(self.value).contiguous()

    def as_nchw(self, x: Tensor) -> Tensor:
        """A view (batch, channels, height, width) of a tensor in this layout."""
        return x.permute([self.value.index(axis) for axis in range(4)])


def layout_for_batch(batch: int) -> GpuLayout:
    """CHWN where the batch fills its 16-byte accesses, else NHWC."""
    return GpuLayout.CHWN if batch and batch % BATCH_MULTIPLE == 0 else GpuLayout.NHWC


def all_groups(structure: GroupStructure) -> tuple[Group, ...]:
    """The groups, and one more that reads nothing and writes the absent channels, so that all are written.

    The weights of that group are (absent, 0, kh, kw). By the op's definition (reference.py) an absent channel
    has no bias, whatever stands in the bias there.
    """
    if not structure.absent:
        return structure.groups
    return (*structure.groups, Group((), structure.absent))


class GpuConv(Protocol):
    """One convolution, its weights arranged, ready to launch."""

    def __call__(self, x: Tensor, out: Tensor, residual: Tensor | None = None) -> None:
        """x, out, residual: contiguous in the layout it was prepared for; out is overwritten whole.

        residual may be ``out`` itself: every element is read before it is written. Launches on the current
        stream of x's device and returns; no synchronisation, no allocation that a CUDA graph could not hold.
        """
        ...


class GpuKernels(Protocol):
    """One family of kernels."""

    name: str

    def can_run(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: GpuLayout
    ) -> tuple[bool, str]:
        """Whether it runs this convolution on this device and layout; the reason if not."""
        ...

    def prepare(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None, layout: GpuLayout
    ) -> GpuConv:
        """weights[g]: (O_g, C_g, kh, kw), bias: (out_channels,) or None, on the device that will run them."""
        ...


GPU_KERNELS: Registry[GpuKernels] = Registry("GPU kernel")
