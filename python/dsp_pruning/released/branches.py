"""Branches of a released network as one packed convolution and one batch norm.

The released networks run every group as a branch of its own: gather, convolution, norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPError, DSPFormatError

# Tensors of a batch norm, and what they hold for an absent channel: it stays 0.
NORM = {"weight": 0.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}


@dataclass(frozen=True)
class NamedTensor:
    """A tensor of a file and its name there."""

    name: str
    tensor: Tensor


@dataclass(frozen=True)
class Branch:
    """index: channels that it reads; weight: (O, C, kh, kw); norm: its tensors in the order of ``NORM``."""

    index: tuple[int, ...]
    weight: NamedTensor
    bias: NamedTensor | None = None
    norm: tuple[NamedTensor, ...] | None = None

    @property
    def filters(self) -> int:
        return len(self.weight.tensor)


def copy_into(target: Tensor, source: NamedTensor) -> None:
    """Fill a parameter or buffer. Raises DSPFormatError for another shape."""
    if source.tensor.shape != target.shape:
        raise DSPFormatError(
            f"{source.name!r} has shape {tuple(source.tensor.shape)}; expected {tuple(target.shape)}"
        )
    with torch.no_grad():
        target.copy_(source.tensor)


def joined_conv(
    name: str,
    branches: Sequence[Branch],
    places: Sequence[Sequence[int]],
    widths: tuple[int, int],
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
) -> PackedConv2d:
    """One convolution of all branches. places[g]: output channels of branch g; widths: in, out."""
    biased = bool(branches) and branches[0].bias is not None
    groups = [(branch.index, tuple(place)) for branch, place in zip(branches, places, strict=True)]
    try:
        structure = GroupStructure.build(*widths, groups)
        conv = PackedConv2d(structure, kernel_size, stride, padding, dilation, bias=biased)
    except DSPError as error:
        raise DSPFormatError(f"the branches of {name!r} do not fit together: {error}") from error
    for branch, weight in zip(branches, conv.weights, strict=True):
        copy_into(weight, branch.weight)
    _scatter(conv.bias, [branch.bias for branch in branches], places)
    return conv


def joined_norm(
    branches: Sequence[Branch], places: Sequence[Sequence[int]], channels: int, eps: float, momentum: float
) -> nn.BatchNorm2d:
    """The norms of all branches as one. Raises DSPFormatError for tensors of another length."""
    norm = nn.BatchNorm2d(channels, eps, momentum)
    for number, (part, absent) in enumerate(NORM.items()):
        values = getattr(norm, part).data.fill_(absent)
        _scatter(values, [branch.norm[number] if branch.norm else None for branch in branches], places)
    return norm


def _scatter(
    target: Tensor | None, parts: Sequence[NamedTensor | None], places: Sequence[Sequence[int]]
) -> None:
    for part, place in zip(parts, places, strict=True):
        if part is not None and target is not None:
            own = target.new_empty(len(place))
            copy_into(own, part)
            target.data[list(place)] = own
