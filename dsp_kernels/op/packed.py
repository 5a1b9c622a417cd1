"""PackedConv2d: a pruned, grouped convolution as several small ones, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels.errors import DSPShapeError
from dsp_kernels.op.reference import conv_output_hw
from dsp_kernels.op.structure import GroupStructure

__all__ = ["PackedConv2d", "pair"]


def pair(value: int | Sequence[int], name: str, least: int) -> tuple[int, int]:
    """(vertical, horizontal) from one or two integers. Raises DSPShapeError below ``least``."""
    # A SymInt is an int that torch.compile does not know yet.
    values = (value, value) if isinstance(value, int | torch.SymInt) else tuple(value)
    if len(values) != 2 or not all(isinstance(v, int | torch.SymInt) and v >= least for v in values):
        raise DSPShapeError(f"{name} is {value!r}; expected one or two integers of at least {least}")
    return values[0], values[1]


class PackedConv2d(nn.Module):
    """A convolution of groups that each read their own input channels; trainable, on any device.

    Input (batch, structure.in_channels, height, width), output (batch, structure.out_channels, ...).
    ``weights[g]``: (O_g, C_g, kh, kw) for the channels of ``structure.groups[g]``; ``bias``: (out_channels,)
    or None. Absent output channels hold 0, whatever the bias says there.
    The zero-padded convolution of every group equals the masked dense convolution.
    """

    def __init__(
        self,
        structure: GroupStructure,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.structure = structure
        self.kernel_size = pair(kernel_size, "kernel_size", 1)
        self.stride = pair(stride, "stride", 1)
        self.padding = pair(padding, "padding", 0)
        self.dilation = pair(dilation, "dilation", 1)
        self.weights = nn.ParameterList(
            torch.empty(len(g.out_index), len(g.in_index), *self.kernel_size, device=device, dtype=dtype)
            for g in structure.groups
        )
        self.bias = (
            nn.Parameter(torch.empty(structure.out_channels, device=device, dtype=dtype)) if bias else None
        )
        self.reset_index(device)
        self.reset_parameters()

    @property
    def in_channels(self) -> int:
        """Width of the input."""
        return self.structure.in_channels

    @property
    def out_channels(self) -> int:
        """Width of the output, absent channels included."""
        return self.structure.out_channels

    def reset_index(self, device: torch.device | str | None = None) -> None:
        """Make the index buffers from the structure."""
        # Buffers, so that they follow the module to its device; not in the state dict, because a file's
        # indices would bypass the structure's checks.
        structure = self.structure
        for number, group in enumerate(structure.groups):
            in_index = torch.tensor(group.in_index, dtype=torch.long, device=device)
            self.register_buffer(f"in_index_{number}", in_index, persistent=False)
        branch_order = [channel for group in structure.groups for channel in group.out_index]
        position = {channel: place for place, channel in enumerate((*branch_order, *structure.absent))}
        places = [position[channel] for channel in range(structure.out_channels)]
        self.outputs_in_order = places == sorted(places)
        self.register_buffer(
            "output_place", torch.tensor(places, dtype=torch.long, device=device), persistent=False
        )

    def reset_parameters(self) -> None:
        """He-uniform weights and zero bias, as a freshly made convolution has them."""
        for weight in self.weights:
            if weight.numel():
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (nn.Conv2d's name)
        """input: (batch, in_channels, height, width) -> (batch, out_channels, out_height, out_width)."""
        x = input
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise DSPShapeError(
                f"PackedConv2d got an input of shape {tuple(x.shape)}; "
                f"expected (batch, {self.in_channels}, height, width)"
            )
        branches = []
        for number, weight in enumerate(self.weights):
            if weight.shape[1] == 0:
                branches.append(self._zeros(x, weight.shape[0]))
                continue
            gathered = x.index_select(1, getattr(self, f"in_index_{number}"))
            branches.append(F.conv2d(gathered, weight, None, self.stride, self.padding, self.dilation))
        if self.structure.absent:
            branches.append(self._zeros(x, len(self.structure.absent)))
        y = torch.cat(branches, 1) if len(branches) > 1 else branches[0]
        if not self.outputs_in_order:
            y = y.index_select(1, self.get_buffer("output_place"))
        if self.bias is None:
            return y
        return y + self._live_bias()[:, None, None]

    def _zeros(self, x: Tensor, channels: int) -> Tensor:
        height, width = conv_output_hw(
            x.shape[2:], self.kernel_size, self.stride, self.padding, self.dilation
        )
        return x.new_zeros(x.shape[0], channels, height, width)

    def _live_bias(self) -> Tensor:
        """The bias with zeros in the absent channels: those hold 0 by definition."""
        assert self.bias is not None
        if not self.structure.absent:
            return self.bias
        written = self.get_buffer("output_place") < self.out_channels - len(self.structure.absent)
        return self.bias * written.to(self.bias.dtype)

    def extra_repr(self) -> str:
        """Structure and settings, for print()."""
        return (
            f"{self.structure}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}"
        )
