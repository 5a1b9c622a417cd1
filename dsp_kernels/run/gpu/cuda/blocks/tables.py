"""Weights and tiles of one residual block in the order in which its CUDA kernel reads them.

A *slot* is a channel of a feature map held in shared memory: channels of the block's input that anything
reads, and channels of an inner map that the next convolution reads. Filters that write no slot are not
computed. The tiles do not depend on the input size; addresses in shared memory do (geometry.py). See
csrc/cuda/block_kernel.cuh.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.program.steps import ConvStep
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep
from dsp_kernels.run.gpu.cuda.groups import FilterGroup, bias_per_channel, fragments, groups_of, join_groups

STEP = 16  # rows of the reduction of one mma
# Clocks of a multiprocessor per step of a tile for eight chunks, by filters of the tile: 16 are bound by
# shared memory (128 bytes per clock), 32 by mma.sync. Estimates, not measured; the outputs of a tile cost
# as much as two steps.
STEP_CLOCKS = {16: 20.0, 32: 24.5}
_FINISH_STEPS = 2

# A row of the reduction: slot, and offset in pixels (vertical, horizontal), in its source region.
Row = tuple[int, int, int]


@dataclass(frozen=True)
class Tile:
    """Filters of one tile. rows: of their own region; second_rows: of the block's input, for the shortcut.

    Both have a multiple of 16 entries. targets: slot of the next region, or output channel, or -1.
    """

    rows: tuple[Row, ...]
    second_rows: tuple[Row, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class BlockTables:
    """The part of a launch that does not depend on the input size.

    tiles: per convolution, the longest reduction first. channels: of every slot of the input; slots: number
    of slots per region but the last. targets: of all filters of all tiles; added: the input slots that are
    added to them (-1: none). weights: 1-D, in the tensors' dtype; bias: float32, one per filter of every
    tile.
    """

    step: BlockStep
    filters: int
    tiles: tuple[tuple[Tile, ...], ...]
    channels: tuple[int, ...]
    slots: tuple[int, ...]
    targets: tuple[int, ...]
    added: tuple[int, ...]
    weights: Tensor
    bias: Tensor


def block_channels(step: BlockStep) -> list[Sequence[int]]:
    """The channels that each region holds, in the order of their slots; all outputs for the last one."""
    outputs = range(step.convs[-1].spec.structure.out_channels)
    first = set(step.convs[0].spec.structure.read)
    if step.shortcut:
        first |= set(step.shortcut.spec.structure.read)
    if step.adds_input:
        first |= set(outputs)
    return [sorted(first), *(sorted(conv.spec.structure.read) for conv in step.convs[1:]), outputs]


def block_tables(step: BlockStep, dtype: torch.dtype, device: torch.device) -> BlockTables:
    """The tables of a block for tensors of this dtype on this device."""
    channels = block_channels(step)
    slots = [{channel: slot for slot, channel in enumerate(each)} for each in channels]

    def tiled(filters: int) -> list[list[FilterGroup]]:
        return [
            _merged(_only(groups_of(conv.spec, conv.weights), set(written)), filters)
            for conv, written in zip(step.convs, slots[1:], strict=True)
        ]

    filters, convs = min(
        ((filters, tiled(filters)) for filters in STEP_CLOCKS),
        key=lambda choice: sum(_work(group, choice[0]) for groups in choice[1] for group in groups),
    )
    tiles, weights, bias = [], [], []
    for conv, groups, read, written in zip(step.convs, convs, slots, slots[1:], strict=False):
        shortcut = step.shortcut if conv is step.convs[-1] else None
        values = bias_per_channel(conv.spec, conv.bias)
        if shortcut:
            values = values + bias_per_channel(shortcut.spec, shortcut.bias)
        made = [
            _tile(group, start, filters, conv.spec, read, shortcut, slots[0])
            for group in groups
            for start in range(0, len(group.out_index), filters)
        ]
        made.sort(key=lambda entry: -entry[1].shape[1])
        for tile, matrix in made:
            index = torch.tensor(tile.targets)
            bias.append(torch.where(index >= 0, values[index.clamp(min=0)], 0.0))
            weights.append(fragments(matrix))
        tiles.append(
            tuple(replace(tile, targets=tuple(written.get(c, -1) for c in tile.targets)) for tile, _ in made)
        )
    targets = [target for made in tiles for tile in made for target in tile.targets]
    added = [-1] * len(targets)
    if step.adds_input:
        last = len(targets) - filters * len(tiles[-1])
        added[last:] = [slots[0].get(channel, -1) for channel in targets[last:]]
    return BlockTables(
        step,
        filters,
        tuple(tiles),
        tuple(channels[0]),
        tuple(len(each) for each in channels[:-1]),
        tuple(targets),
        tuple(added),
        torch.cat(weights).to(device, dtype),
        torch.cat(bias).to(device),
    )


def _work(group: FilterGroup, filters: int) -> float:
    return _clocks(len(group.out_index), len(group.in_index) * group.weight.shape[2], filters)


def _clocks(outputs: int, rows: int, filters: int) -> float:
    """Of filters with ``rows`` rows in their reduction, for eight chunks."""
    return -(-outputs // filters) * (-(-rows // STEP) + _FINISH_STEPS) * STEP_CLOCKS[filters]


def _merged(groups: Sequence[FilterGroup], filters: int) -> list[FilterGroup]:
    """Groups joined pairwise, the pair that saves most first, while that is less work."""
    bins = list(groups)
    work = [_work(each, filters) for each in bins]
    while True:
        best, pair = 0.0, None
        for i in range(len(bins)):
            for j in range(i + 1, len(bins)):
                outputs = len(bins[i].out_index) + len(bins[j].out_index)
                rows = len({*bins[i].in_index, *bins[j].in_index}) * bins[i].weight.shape[2]
                saved = work[i] + work[j] - _clocks(outputs, rows, filters)
                if saved > best:
                    best, pair = saved, (i, j)
        if pair is None:
            return bins
        i, j = pair
        bins[i] = join_groups([bins[i], bins.pop(j)])
        work.pop(j)
        work[i] = _work(bins[i], filters)


def _only(groups: Sequence[FilterGroup], read: set[int]) -> list[FilterGroup]:
    """The groups without filters whose outputs nothing reads."""
    kept = []
    for group in groups:
        rows = [row for row, channel in enumerate(group.out_index) if channel in read]
        if rows:
            outputs = tuple(group.out_index[row] for row in rows)
            kept.append(FilterGroup(group.in_index, outputs, group.weight[rows]))
    return kept


def _tile(
    group: FilterGroup,
    start: int,
    filters: int,
    spec: ConvSpec,
    slot_of: dict[int, int],
    shortcut: ConvStep | None,
    input_slots: dict[int, int],
) -> tuple[Tile, Tensor]:
    """The tile of a group's filters from ``start`` on, with channels as targets; weights (filters, rows)."""
    outputs = list(group.out_index[start : start + filters])
    rows, matrix = _reduction(group.in_index, group.weight[start : start + filters], spec, slot_of)
    second_rows: list[Row] = []
    if shortcut:
        second, weight = _shortcut_of(outputs, shortcut)
        second_rows, more = _reduction(second, weight, shortcut.spec, input_slots)
        matrix = torch.cat([matrix, more], 1)
    missing = filters - len(outputs)
    tile = Tile(tuple(rows), tuple(second_rows), (*outputs, *[-1] * missing))
    return tile, F.pad(matrix, (0, 0, 0, missing))


def _reduction(
    in_index: Sequence[int], weight: Tensor, spec: ConvSpec, slot_of: dict[int, int]
) -> tuple[list[Row], Tensor]:
    """weight: (filters, channels, taps) -> its rows, padded to a multiple of STEP, and (filters, rows).

    Padding rows read the last channel again, with weights of zero.
    """
    order = _spread([slot_of[channel] for channel in in_index])
    (kh, kw), (dy, dx) = spec.kernel_size, spec.dilation
    slots = [slot_of[in_index[i]] for i in order]
    rows = [(slot, y * dy, x * dx) for y in range(kh) for x in range(kw) for slot in slots]
    matrix = weight[:, torch.tensor(order, dtype=torch.long)].transpose(1, 2).reshape(len(weight), len(rows))
    missing = -len(rows) % STEP
    rows += rows[-1:] * missing
    return rows, F.pad(matrix, (0, missing))


def _spread(slots: Sequence[int]) -> list[int]:
    """An order in which any eight neighbours differ modulo 8 where possible, to use all banks."""
    buckets: dict[int, list[int]] = {}
    for i, slot in enumerate(slots):
        buckets.setdefault(slot % 8, []).append(i)
    order = []
    while buckets:
        fullest = sorted(buckets, key=lambda key: -len(buckets[key]))
        order += [buckets[key].pop(0) for key in fullest]
        buckets = {key: bucket for key, bucket in buckets.items() if bucket}
    return order


def _shortcut_of(outputs: Sequence[int], shortcut: ConvStep) -> tuple[tuple[int, ...], Tensor]:
    """The shortcut's input channels for these outputs, and its weights (outputs, channels, taps)."""
    joined = join_groups(_only(groups_of(shortcut.spec, shortcut.weights), set(outputs)))
    columns = sorted(range(len(joined.in_index)), key=joined.in_index.__getitem__)
    rows = [joined.out_index.index(channel) for channel in outputs]
    return tuple(joined.in_index[i] for i in columns), joined.weight[rows][:, columns]
