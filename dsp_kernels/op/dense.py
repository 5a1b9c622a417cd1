"""Groups as tensors: index tensors, group weights as one dense weight and back, a batch norm folded in."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import Group, GroupStructure

Indices = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]


def index_tensors(structure: GroupStructure, device: torch.device | str | None = None) -> Indices:
    """(in_index, out_index): for every group g int64 tensors of shape (C_g,) and (O_g,)."""

    def tensor(index: tuple[int, ...]) -> Tensor:
        return torch.tensor(index, dtype=torch.long, device=device)

    groups = structure.groups
    return tuple(tensor(g.in_index) for g in groups), tuple(tensor(g.out_index) for g in groups)


def dense_weight(structure: GroupStructure, weights: Sequence[Tensor], kernel_size: Sequence[int]) -> Tensor:
    """weights[g]: (O_g, C_g, kh, kw) -> (out_channels, in_channels, kh, kw) with 0 between the groups."""
    like = weights[0] if len(weights) else torch.empty(0)
    dense = like.new_zeros(structure.out_channels, structure.in_channels, *kernel_size)
    for columns, rows, weight in zip(*index_tensors(structure, like.device), weights, strict=True):
        dense[rows[:, None], columns] = weight
    return dense


def group_weights(structure: GroupStructure, dense: Tensor) -> tuple[Tensor, ...]:
    """dense: (out_channels, in_channels, ...) -> a copy (O_g, C_g, ...) for every group g."""
    indices = zip(*index_tensors(structure, dense.device), strict=True)
    return tuple(dense[rows[:, None], columns] for columns, rows in indices)


def live_bias(structure: GroupStructure, bias: Tensor | None) -> Tensor | None:
    """bias: (out_channels,) or None. The same with 0 in absent channels, which have no bias."""
    if bias is None or not structure.absent:
        return bias
    return bias.index_fill(0, torch.tensor(structure.absent, device=bias.device), 0.0)


class Norm(NamedTuple):
    """The tensors of a batch norm in eval mode, named as those of nn.BatchNorm2d."""

    running_mean: Tensor
    running_var: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def batch_norm_affine(norm: nn.BatchNorm2d | Norm) -> tuple[Tensor, Tensor]:
    """(scale, shift), each (channels,) in float64, with norm(x) = x * scale + shift in eval mode."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.detach().double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.detach().double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    return scale, shift


# Spec, weights and bias of a convolution.
Conv = tuple[ConvSpec, tuple[Tensor, ...], Tensor | None]


def fold_affine(conv: Conv, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Conv:
    """The convolution that equals ``conv(x) * scale + shift`` per channel.

    scale, shift: (out_channels,) in float64. dtype: of the bias.
    An absent channel is 0 before and ``shift`` after. Where that is not 0, a group that reads no channel is
    added to write it, so folding is exact for every structure.
    """
    spec, weights, bias = conv
    structure = spec.structure
    folded_bias = live_bias(structure, None if bias is None else bias.detach().double() * scale)
    _, out_index = index_tensors(structure, scale.device)
    folded = [
        (weight.detach().double() * scale[rows][:, None, None, None]).to(weight.dtype)
        for rows, weight in zip(out_index, weights, strict=True)
    ]
    constant = tuple(channel for channel in structure.absent if shift[channel] != 0)
    if constant:
        groups = (*structure.groups, Group((), constant))
        structure = GroupStructure(structure.in_channels, structure.out_channels, groups)
        folded.append(torch.zeros(len(constant), 0, *spec.kernel_size, dtype=dtype, device=shift.device))
    full_bias = shift if folded_bias is None else folded_bias + shift
    return replace(spec, structure=structure), tuple(folded), full_bias.to(dtype)
