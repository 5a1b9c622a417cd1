"""FixedSizeConv2d: a convolution with a bias for every place of its output, for images of one size."""

from __future__ import annotations

from torch import Tensor, nn

from dsp_kernels.graph.size_check import SizeCheck
from dsp_kernels.op.packed import PackedConv2d

__all__ = ["FixedSizeConv2d"]


class FixedSizeConv2d(nn.Module):
    """conv(x) + position_bias, for the one size of x that the bias was made for.

    conv: a convolution; check: lets that size pass, so x of another one raises DSPShapeError;
    position_bias: (out_channels, out_height, out_width), what channels that held a number gave to every
    place. At the border it differs from the middle, because zeros were padded around those channels.
    """

    def __init__(self, conv: nn.Conv2d | PackedConv2d, check: SizeCheck, position_bias: Tensor) -> None:
        super().__init__()
        self.conv = conv
        self.check = check
        self.position_bias = nn.Parameter(position_bias, next(conv.parameters(), position_bias).requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, in_channels, height, width) -> (batch, out_channels, out_height, out_width)."""
        return self.conv(self.check(x)) + self.position_bias
