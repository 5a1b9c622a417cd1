"""Groups of filters and the weight orders of the CUDA kernels."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsp_kernels.op.dense import live_bias
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.gpu.layout import all_groups


@dataclass(frozen=True)
class FilterGroup:
    """Filters that read the same channels; weight: (filters, channels, taps), float32."""

    in_index: tuple[int, ...]
    out_index: tuple[int, ...]
    weight: Tensor


def groups_of(spec: ConvSpec, weights: Sequence[Tensor]) -> list[FilterGroup]:
    """weights[g]: (O_g, C_g, kh, kw) on any device -> ``all_groups`` with their weights, on the CPU."""
    flat = [weight.detach().cpu().float().flatten(2) for weight in weights]
    if spec.structure.absent:
        flat.append(torch.zeros(len(spec.structure.absent), 0, spec.kernel_size[0] * spec.kernel_size[1]))
    return [
        FilterGroup(group.in_index, group.out_index, weight)
        for group, weight in zip(all_groups(spec.structure), flat, strict=True)
    ]


def join_groups(groups: Sequence[FilterGroup]) -> FilterGroup:
    """One group that reads the union of their channels, with zeros where a filter does not read a channel."""
    if len(groups) == 1:
        return groups[0]
    in_index = tuple(sorted({channel for group in groups for channel in group.in_index}))
    out_index = tuple(channel for group in groups for channel in group.out_index)
    column = {channel: number for number, channel in enumerate(in_index)}
    weight = torch.zeros(len(out_index), len(in_index), groups[0].weight.shape[2])
    row = 0
    for group in groups:
        columns = torch.tensor([column[channel] for channel in group.in_index], dtype=torch.long)
        weight[row : row + len(group.out_index)].index_copy_(1, columns, group.weight)
        row += len(group.out_index)
    return FilterGroup(in_index, out_index, weight)


def bias_per_channel(spec: ConvSpec, bias: Tensor | None) -> Tensor:
    """bias: (out_channels,) or None -> (out_channels,), float32, on the CPU; 0 in absent channels."""
    live = live_bias(spec.structure, bias)
    return torch.zeros(spec.structure.out_channels) if live is None else live.detach().cpu().float()


def is_run(octet: Sequence[int], channels: int) -> bool:
    """Whether eight channels are one aligned 16-byte piece of every pixel (16-bit NHWC)."""
    first = octet[0]
    return (
        first >= 0 and channels % 8 == 0 and first % 8 == 0 and list(octet) == list(range(first, first + 8))
    )


def in_runs(group: FilterGroup, in_channels: int, out_channels: int) -> FilterGroup:
    """The same group with channels and filters reordered so that whole aligned runs come first."""
    columns, rows = _runs_first(group.in_index, in_channels), _runs_first(group.out_index, out_channels)
    return FilterGroup(
        tuple(group.in_index[i] for i in columns),
        tuple(group.out_index[i] for i in rows),
        group.weight[rows][:, columns],
    )


def _runs_first(index: Sequence[int], channels: int) -> list[int]:
    position = {channel: i for i, channel in enumerate(index)}
    octets = range(0, channels, 8) if channels % 8 == 0 else ()
    whole = [
        range(first, first + 8) for first in octets if all(c in position for c in range(first, first + 8))
    ]
    ordered = [position[channel] for run in whole for channel in run]
    first = set(ordered)
    return ordered + [i for i in range(len(index)) if i not in first]


def fragments(weight: Tensor) -> Tensor:
    """weight: (filters, rows), multiples of 16 -> flat, as the A operands of mma.m16n8k16.

    Order: step of 16 rows, 16 filters, lane, then the lane's eight numbers: its 32-bit registers iterate over
    the two halves of the filters, then over those of the rows.
    """
    filters, rows = weight.shape
    # m, filter half, group, step, row half, quad, i
    parts = weight.view(filters // 16, 2, 8, rows // 16, 2, 4, 2)
    return parts.permute(3, 0, 2, 5, 4, 1, 6).reshape(-1)


def _cores(weight: Tensor) -> Tensor:
    """weight: (filters, rows), multiples of 64 and 16 -> flat, as the A operands of wgmma in shared memory.

    Order: eight rows, filter, row: core matrices of eight filters by eight rows, each contiguous.
    """
    filters, rows = weight.shape
    return weight.view(filters, rows // 8, 8).transpose(0, 1).reshape(-1)


# (filters, rows) -> flat
WEIGHT_ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "fragments": fragments,
    "cores": _cores,
    "rows": lambda weight: weight.t().reshape(-1),  # [row][filter]
}
