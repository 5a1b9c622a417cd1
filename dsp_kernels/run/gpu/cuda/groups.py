"""Filters by the channels that they read, and their weights in the orders of the CUDA kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.eager.conv import bias_of_live
from dsp_kernels.run.gpu.layout import all_groups

__all__ = [
    "WEIGHT_ORDERS",
    "FilterGroup",
    "bias_per_channel",
    "fragments",
    "groups_of",
    "in_runs",
    "is_run",
    "join_groups",
]


@dataclass(frozen=True)
class FilterGroup:
    """Filters that read one set of channels; weight: (filters, channels, taps), float32."""

    in_index: tuple[int, ...]
    out_index: tuple[int, ...]
    weight: Tensor


def groups_of(spec: ConvSpec, weights: Sequence[Tensor]) -> list[FilterGroup]:
    """weights[g]: (O_g, C_g, kh, kw) on any device -> every group, the absent channels' too, on the CPU."""
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    groups = all_groups(spec.structure)
    flat = [
        weight.detach().cpu().float().reshape(len(group.out_index), len(group.in_index), taps)
        for group, weight in zip(groups, weights, strict=False)
    ]
    # The group of the absent channels has no weights of its own.
    flat += [torch.zeros(len(group.out_index), 0, taps) for group in groups[len(flat) :]]
    return [
        FilterGroup(group.in_index, group.out_index, weight)
        for group, weight in zip(groups, flat, strict=True)
    ]


def join_groups(groups: Sequence[FilterGroup]) -> FilterGroup:
    """One group that reads what any of them reads, with zeros where a filter does not read a channel."""
    if len(groups) == 1:
        return groups[0]
    in_index = tuple(sorted({channel for group in groups for channel in group.in_index}))
    out_index = tuple(channel for group in groups for channel in group.out_index)
    place = {channel: column for column, channel in enumerate(in_index)}
    weight = torch.zeros(len(out_index), len(in_index), groups[0].weight.shape[2])
    row = 0
    for group in groups:
        columns = torch.tensor([place[channel] for channel in group.in_index], dtype=torch.long)
        weight[row : row + len(group.out_index)].index_copy_(1, columns, group.weight)
        row += len(group.out_index)
    return FilterGroup(in_index, out_index, weight)


def bias_per_channel(spec: ConvSpec, bias: Tensor | None) -> Tensor:
    """bias: (out_channels,) or None -> (out_channels,), float32, on the CPU; an absent channel has none."""
    live = bias_of_live(spec, bias)
    return torch.zeros(spec.structure.out_channels) if live is None else live.detach().cpu().float()


def is_run(octet: Sequence[int], channels: int) -> bool:
    """Whether eight channels lie in one aligned 16-byte piece of every pixel."""
    first = octet[0]
    return (
        first >= 0 and channels % 8 == 0 and first % 8 == 0 and list(octet) == list(range(first, first + 8))
    )


def in_runs(group: FilterGroup, in_channels: int, out_channels: int) -> FilterGroup:
    """The same group, its channels and filters reordered so that whole aligned runs come first."""
    columns, rows = _runs_first(group.in_index, in_channels), _runs_first(group.out_index, out_channels)
    return FilterGroup(
        tuple(group.in_index[i] for i in columns),
        tuple(group.out_index[i] for i in rows),
        group.weight[rows][:, columns],
    )


def _runs_first(index: Sequence[int], channels: int) -> list[int]:
    place = {channel: i for i, channel in enumerate(index)}
    octets = range(0, channels, 8) if channels % 8 == 0 else ()
    whole = [range(first, first + 8) for first in octets if all(c in place for c in range(first, first + 8))]
    ordered = [place[channel] for run in whole for channel in run]
    taken = set(ordered)
    return ordered + [i for i in range(len(index)) if i not in taken]


def fragments(weight: Tensor) -> Tensor:
    """weight: (filters, rows), multiples of 16 -> flat, as the A operands of mma.m16n8k16.

    Order: step of 16 rows, 16 filters, lane, then the lane's eight numbers: its 32-bit registers go through
    the two halves of the filters first, then through those of the rows.
    """
    filters, rows = weight.shape
    parts = weight.view(
        filters // 16, 2, 8, rows // 16, 2, 4, 2
    )  # m, filter half, group, step, row half, quad, i
    return parts.permute(3, 0, 2, 5, 4, 1, 6).reshape(-1)


def _cores(weight: Tensor) -> Tensor:
    """weight: (filters, rows), multiples of 64 and 16 -> flat, as the A operands of wgmma in shared memory.

    Order: eight rows, filter, row: the core matrices of eight filters by eight rows, each in one piece.
    """
    filters, rows = weight.shape
    return weight.view(filters, rows // 8, 8).transpose(0, 1).reshape(-1)


def _rows(weight: Tensor) -> Tensor:
    """weight: (filters, rows) -> flat, [row][filter]."""
    return weight.t().reshape(-1)


WEIGHT_ORDERS = {"fragments": fragments, "cores": _cores, "rows": _rows}
