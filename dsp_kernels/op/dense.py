"""Groups as tensors: channel lists as index tensors, group weights as one dense weight and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsp_kernels.op.structure import GroupStructure


def index_tensors(
    structure: GroupStructure, device: torch.device | str | None = None
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
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
