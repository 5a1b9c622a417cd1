"""The definition of the op. Every backend is tested against it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_kernels.op.activations import activate
from dsp_kernels.op.structure import GroupStructure


def conv_output_hw(
    input_hw: Sequence[int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> tuple[int, int]:
    """(height, width) of a convolution's output; all arguments are (vertical, horizontal) in pixels."""
    height, width = (
        (input_hw[i] + 2 * padding[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    return height, width


def gather_grouped_conv2d_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    structure: GroupStructure,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    *,
    kernel_size: tuple[int, int] | None = None,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] = (0, 0),
    dilation: tuple[int, int] = (1, 1),
    activation: str = "none",
) -> Tensor:
    """``gather_grouped_conv2d``, one output channel at a time, computed in float32 or more precisely.

    For every group g: y[:, out_g] = act(conv(x[:, in_g], W_g) + bias[out_g] (+ residual[:, out_g])).
    Absent channels are act(residual), or act(0).
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    kernel_size = kernel_size or (weights[0].shape[2], weights[0].shape[3])
    height, width = conv_output_hw(x.shape[2:], kernel_size, stride, padding, dilation)
    y = torch.zeros(x.shape[0], structure.out_channels, height, width, dtype=compute, device=x.device)
    if residual is not None:
        y = y + residual.to(compute)
    for group, weight in zip(structure.groups, weights, strict=True):
        for row, out_channel in enumerate(group.out_index):
            if group.in_index:
                gathered = x[:, list(group.in_index)].to(compute)
                y[:, out_channel] += F.conv2d(
                    gathered, weight[row : row + 1].to(compute), None, stride, padding, dilation
                )[:, 0]
            if bias is not None:
                y[:, out_channel] += bias[out_channel].to(compute)
    return activate(y, activation).to(x.dtype)
