"""ConvSpec: everything about one gather-grouped convolution but its weights and bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.errors import DSPShapeError
from dsp_kernels.op.activations import ACTIVATIONS
from dsp_kernels.op.reference import conv_output_hw
from dsp_kernels.op.structure import GroupStructure


def pair(value: int | Sequence[int], name: str, least: int) -> tuple[int, int]:
    """(vertical, horizontal) from one or two integers. Raises DSPShapeError below ``least``."""
    # A SymInt is an int that torch.compile does not know yet.
    values = (value, value) if isinstance(value, int | float | torch.SymInt) else tuple(value)
    if len(values) != 2 or not all(isinstance(v, int | torch.SymInt) and v >= least for v in values):
        raise DSPShapeError(f"{name} is {value!r}; expected one or two integers of at least {least}")
    return values[0], values[1]


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format of the op's output: channels_last if x (4-D) is, unless it is also contiguous."""
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


@dataclass(frozen=True)
class ConvSpec:
    """Structure and settings of one convolution and the activation after it.

    kernel_size, stride, padding, dilation: (vertical, horizontal) in pixels, or one integer for both.
    Raises DSPShapeError for invalid settings.
    """

    structure: GroupStructure
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    activation: str = "none"

    def __post_init__(self) -> None:
        for name, least in (("kernel_size", 1), ("stride", 1), ("padding", 0), ("dilation", 1)):
            object.__setattr__(self, name, pair(getattr(self, name), name, least))
        if self.activation not in ACTIVATIONS:
            raise DSPShapeError(
                f"activation {self.activation!r} is unknown; known are {', '.join(ACTIVATIONS)}"
            )

    def __str__(self) -> str:
        names = ("kernel_size", "stride", "padding", "dilation", "activation")
        return ", ".join([str(self.structure), *(f"{name}={getattr(self, name)}" for name in names)])

    def with_activation(self, activation: str) -> ConvSpec:
        """The same convolution followed by another activation."""
        return replace(self, activation=activation)

    @property
    def settings(self) -> tuple[Any, ...]:
        """All but the structure, in the order of the op's arguments."""
        return self.kernel_size, self.stride, self.padding, self.dilation, self.activation

    def output_hw(self, input_hw: Sequence[int]) -> tuple[int, int]:
        """(height, width) of the output. Raises DSPShapeError if the input is smaller than the kernel."""
        height, width = conv_output_hw(input_hw, self.kernel_size, self.stride, self.padding, self.dilation)
        if height < 1 or width < 1:
            raise DSPShapeError(
                f"an input of {input_hw[0]}x{input_hw[1]} pixels is too small for a kernel of "
                f"{self.kernel_size} with padding {self.padding} and dilation {self.dilation}"
            )
        return height, width

    def output_shape(self, input_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """(batch, out_channels, height, width) for an input of (batch, channels, height, width)."""
        return (input_shape[0], self.structure.out_channels, *self.output_hw(input_shape[2:]))

    def check_constants(self, weights: Sequence[Tensor], bias: Tensor | None) -> None:
        """Check weights[g]: (O_g, C_g, kh, kw) and bias: (out_channels,) or None, of one dtype and device.

        Raises DSPShapeError.
        """
        groups = self.structure.groups
        if len(weights) != len(groups):
            raise DSPShapeError(f"{len(weights)} weights for {len(groups)} groups; expected one per group")
        for number, (group, weight) in enumerate(zip(groups, weights, strict=True)):
            expected = (len(group.out_index), len(group.in_index), *self.kernel_size)
            if tuple(weight.shape) != expected:
                raise DSPShapeError(
                    f"weight of group {number} has shape {tuple(weight.shape)}; expected {expected}"
                )
        if bias is not None and tuple(bias.shape) != (self.structure.out_channels,):
            raise DSPShapeError(
                f"bias has shape {tuple(bias.shape)}; expected ({self.structure.out_channels},)"
            )
        kinds = {(t.dtype, t.device) for t in (*weights, *([] if bias is None else [bias]))}
        if len(kinds) > 1:
            found = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise DSPShapeError(f"weights and bias have different dtypes or devices: {found}")

    def check_input(self, x: Tensor, constants: Sequence[Tensor], residual: Tensor | None) -> tuple[int, ...]:
        """Shape of the output for x: (batch, in_channels, height, width).

        constants: weights and bias. Raises DSPShapeError if x, the constants or the residual do not match.
        """
        if x.dim() != 4 or x.shape[1] != self.structure.in_channels:
            raise DSPShapeError(
                f"x has shape {tuple(x.shape)}; expected (batch, {self.structure.in_channels}, height, width)"
            )
        if not x.dtype.is_floating_point:
            raise DSPShapeError(f"x has dtype {x.dtype}; expected a floating point dtype")
        shape = self.output_shape(x.shape)
        for constant in constants:
            if constant.dtype != x.dtype or constant.device != x.device:
                raise DSPShapeError(
                    f"x is {x.dtype} on {x.device}, but a weight or bias is {constant.dtype} on "
                    f"{constant.device}; they must match"
                )
        if residual is not None:
            if tuple(residual.shape) != shape:
                raise DSPShapeError(f"residual has shape {tuple(residual.shape)}; expected {shape}")
            if residual.dtype != x.dtype or residual.device != x.device:
                raise DSPShapeError(
                    f"residual is {residual.dtype} on {residual.device}; x is {x.dtype} on {x.device}"
                )
        return shape
