"""Weights, tables and geometry of one residual block in the order in which its CUDA kernel reads them
(csrc/common/block_params.h).

A *slot* is a channel of a map that has a place in shared memory: of the block's input those that anything reads,
of an inner map those that the next convolution reads; filters that write no slot are not computed. Which filters
form a tile and what they read does not depend on sizes (``BlockTables``); where that lies in shared memory does
(``BlockGeometry``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dsp_kernels.activations import ACTIVATIONS
from dsp_kernels.backends.cuda_tables import _fragments, _Group, _groups_of, _join
from dsp_kernels.block_step import BlockStep
from dsp_kernels.conv_spec import ConvSpec
from dsp_kernels.program import ConvStep

__all__ = ["BlockGeometry", "BlockTables", "Region", "block_tables"]

# csrc/common/block_params.h
MOST_CHUNKS, LARGEST_DIVISOR = 4095, 256
_STEP = 16  # rows of the reduction of one mma
# Clocks of a multiprocessor for one step of a tile at eight chunks, by filters of the tile: 16 are bound by shared
# memory (128 bytes a clock), 32 by mma.sync. Estimates, not measured; a tile's outputs cost as much as two steps.
STEP_CLOCKS = {16: 20.0, 32: 24.5}
_FINISH_STEPS = 2
_PIECE = 16  # bytes of eight images

# A row of the reduction: slot and offset in pixels of the region that it is read from.
Row = tuple[int, int, int]


@dataclass(frozen=True)
class Tile:
    """Filters of one tile: what they read of their own region and of the block's input, and what they write.

    rows, second_rows: multiples of 16 in number. targets: slot of the next region or output channel, -1: none.
    """

    rows: tuple[Row, ...]
    second_rows: tuple[Row, ...]
    targets: tuple[int, ...]


@dataclass(frozen=True)
class BlockTables:
    """What does not depend on sizes. tiles: per convolution, the longest reduction first.

    channels: of every slot of the input; slots: per region but the last, how many it has. weights: 1-D, in the
    tensors' dtype; bias: float32, one per filter of every tile. residual_slots: per output channel the slot of
    the input that is added to it, or empty.
    """

    step: BlockStep
    filters: int
    tiles: tuple[tuple[Tile, ...], ...]
    channels: tuple[int, ...]
    slots: tuple[int, ...]
    residual_slots: tuple[int, ...]
    weights: Tensor
    bias: Tensor

    @cached_property
    def static(self) -> tuple[list[int], list[int]]:
        """Rows' targets, and the slots that are added to them (-1: none), of all tiles one after the other."""
        targets = [target for tiles in self.tiles for tile in tiles for target in tile.targets]
        last = sum(len(tile.targets) for tile in self.tiles[-1])
        added = [-1] * (len(targets) - last)
        if self.residual_slots:
            added += [self.residual_slots[c] if c >= 0 else -1 for c in targets[-last:]]
        else:
            added += [-1] * last
        return targets, added


def block_tables(step: BlockStep, dtype: torch.dtype, device: torch.device) -> BlockTables:
    """The tables of a block whose tensors are of this dtype on this device."""
    specs = [conv.spec for conv in step.convs]
    # What each convolution's source has to hold, in the order of its slots.
    read = [sorted(spec.structure.read) for spec in specs]
    first = set(read[0])
    if step.shortcut:
        first |= set(step.shortcut.spec.structure.read)
    if step.adds_input:
        first |= set(range(specs[-1].structure.out_channels))
    channels = [sorted(first), *read[1:]]
    wanted = [*channels[1:], list(range(specs[-1].structure.out_channels))]

    best: tuple[float, int, list[list[_Group]]] | None = None
    for filters in STEP_CLOCKS:
        merged, work = [], 0.0
        for conv, targets in zip(step.convs, wanted, strict=True):
            taps = conv.spec.kernel_size[0] * conv.spec.kernel_size[1]
            groups = _merged(_only(_groups_of(conv.spec, conv.weights), set(targets)), filters, taps)
            merged.append(groups)
            work += sum(_work(len(each.out_index), len(each.in_index), filters, taps) for each in groups)
        if best is None or work < best[0]:
            best = work, filters, merged
    assert best is not None
    _, filters, merged = best

    all_tiles, weights, bias = [], [], []
    for number, (conv, groups) in enumerate(zip(step.convs, merged, strict=True)):
        place = {channel: slot for slot, channel in enumerate(channels[number])}
        target = {channel: slot for slot, channel in enumerate(wanted[number])}
        is_last = number + 1 == len(step.convs)
        shortcut = step.shortcut if is_last else None
        made = [
            _tile(group, start, filters, conv.spec, place, shortcut, channels[0])
            for group in groups
            for start in range(0, len(group.out_index), filters)
        ]
        made.sort(key=lambda entry: -entry[1].shape[1])
        values = _bias_of(conv) + (_bias_of(shortcut) if shortcut else 0.0)
        tiles = []
        for tile, matrix in made:
            index = torch.tensor(tile.targets)
            bias.append(torch.where(index >= 0, values[index.clamp(min=0)], 0.0))
            slots = tuple(target[c] if c >= 0 else -1 for c in tile.targets)
            tiles.append(Tile(tile.rows, tile.second_rows, slots))
            weights.append(_fragments(matrix))
        all_tiles.append(tuple(tiles))
    residual_slots = ()
    if step.adds_input:
        place = {channel: slot for slot, channel in enumerate(channels[0])}
        residual_slots = tuple(place[channel] for channel in wanted[-1])
    return BlockTables(
        step,
        filters,
        tuple(all_tiles),
        tuple(channels[0]),
        tuple(len(each) for each in channels),
        residual_slots,
        torch.cat(weights).to(device, dtype),
        torch.cat(bias).to(device),
    )


def _work(outputs: int, channels: int, filters: int, taps: int) -> float:
    """Clocks of a group of filters at eight chunks."""
    return -(-outputs // filters) * (-(-channels * taps // _STEP) + _FINISH_STEPS) * STEP_CLOCKS[filters]


def _merged(groups: Sequence[_Group], filters: int, taps: int) -> list[_Group]:
    """Two groups put into one, the pair that saves most first, for as long as that is less work."""
    bins = list(groups)
    work = [_work(len(each.out_index), len(each.in_index), filters, taps) for each in bins]
    while True:
        best, pair = 0.0, None
        for i in range(len(bins)):
            for j in range(i + 1, len(bins)):
                outputs = len(bins[i].out_index) + len(bins[j].out_index)
                channels = len({*bins[i].in_index, *bins[j].in_index})
                saved = work[i] + work[j] - _work(outputs, channels, filters, taps)
                if saved > best:
                    best, pair = saved, (i, j)
        if pair is None:
            return bins
        i, j = pair
        joined = _join([bins[i], bins.pop(j)])
        work.pop(j)
        bins[i], work[i] = joined, _work(len(joined.out_index), len(joined.in_index), filters, taps)


def _only(groups: Sequence[_Group], wanted: set[int]) -> list[_Group]:
    """The groups without the filters that nobody reads."""
    kept = []
    for group in groups:
        rows = [row for row, channel in enumerate(group.out_index) if channel in wanted]
        if rows:
            outputs = tuple(group.out_index[row] for row in rows)
            kept.append(_Group(group.in_index, outputs, group.weight[rows]))
    return kept


def _tile(
    group: _Group,
    start: int,
    filters: int,
    spec: ConvSpec,
    place: dict[int, int],
    shortcut: ConvStep | None,
    input_channels: Sequence[int],
) -> tuple[Tile, Tensor]:
    """The tile of a group's filters from ``start`` on, its targets still channels; its weights, (filters, rows)."""
    outputs = list(group.out_index[start : start + filters])
    rows, matrix = _reduction(group.in_index, group.weight[start : start + filters], spec, place)
    second_rows: list[Row] = []
    if shortcut:
        second, weight = _shortcut_of(outputs, shortcut)
        slots = {channel: slot for slot, channel in enumerate(input_channels)}
        second_rows, more = _reduction(second, weight, shortcut.spec, slots)
        matrix = torch.cat([matrix, more], 1)
    padded = torch.zeros(filters, matrix.shape[1])
    padded[: len(outputs)] = matrix
    outputs += [-1] * (filters - len(outputs))
    return Tile(tuple(rows), tuple(second_rows), tuple(outputs)), padded


def _reduction(
    in_index: Sequence[int], weight: Tensor, spec: ConvSpec, place: dict[int, int]
) -> tuple[list[Row], Tensor]:
    """weight: (filters, channels, taps) -> its rows, filled up to a whole step, and (filters, rows).

    Rows that fill up read the last channel again, with weights of zero.
    """
    order = _spread([place[channel] for channel in in_index])
    (kh, kw), (dy, dx) = spec.kernel_size, spec.dilation
    slots = [place[in_index[i]] for i in order]
    rows = [(slot, y * dy, x * dx) for y in range(kh) for x in range(kw) for slot in slots]
    matrix = weight[:, torch.tensor(order, dtype=torch.long)].transpose(1, 2).reshape(len(weight), len(rows))
    missing = -len(rows) % _STEP
    rows += rows[-1:] * missing
    return rows, torch.nn.functional.pad(matrix, (0, missing))


def _spread(slots: Sequence[int]) -> list[int]:
    """An order in which neighbouring slots differ modulo 8 as long as possible: so they lie in other banks."""
    buckets: dict[int, list[int]] = {}
    for i, slot in enumerate(slots):
        buckets.setdefault(slot % 8, []).append(i)
    order = []
    while buckets:
        for key in sorted(buckets, key=lambda key: -len(buckets[key])):
            order.append(buckets[key].pop(0))
        buckets = {key: bucket for key, bucket in buckets.items() if bucket}
    return order


def _shortcut_of(outputs: Sequence[int], shortcut: ConvStep) -> tuple[tuple[int, ...], Tensor]:
    """The channels that the shortcut reads for these outputs, and (outputs, channels, taps) of its weights."""
    groups = [
        (group, [row for row, channel in enumerate(group.out_index) if channel in set(outputs)])
        for group in _groups_of(shortcut.spec, shortcut.weights)
    ]
    in_index = tuple(sorted({channel for group, rows in groups if rows for channel in group.in_index}))
    column = {channel: i for i, channel in enumerate(in_index)}
    taps = shortcut.spec.kernel_size[0] * shortcut.spec.kernel_size[1]
    weight = torch.zeros(len(outputs), len(in_index), taps)
    for group, rows in groups:
        columns = torch.tensor([column[channel] for channel in group.in_index], dtype=torch.long)
        for row in rows:
            weight[outputs.index(group.out_index[row])].index_copy_(0, columns, group.weight[row])
    return in_index, weight


def _bias_of(conv: ConvStep) -> Tensor:
    structure = conv.spec.structure
    if conv.bias is None:
        return torch.zeros(structure.out_channels)
    # By the definition an absent channel has no bias.
    absent = torch.tensor(structure.absent, dtype=torch.long)
    return conv.bias.detach().cpu().float().index_fill(0, absent, 0.0)


@dataclass(frozen=True)
class Region:
    """See BlockRegion in csrc/common/block_params.h; sizes in pixels, offset and channel_bytes in bytes."""

    offset: int
    channel_bytes: int
    rows: int
    columns: int
    height: int
    width: int
    step: tuple[int, int]
    shift: tuple[int, int]
    slots: int

    def numbers(self) -> list[int]:
        """In the order of the op's sizes."""
        return [
            *(self.offset, self.channel_bytes, self.rows, self.columns, self.height, self.width),
            *self.step,
            *self.shift,
            self.slots,
        ]

    def kept(self, rows: int) -> int:
        """Rows that the next turn needs again, after one of ``rows`` rows of output."""
        return max(0, self.rows - rows * self.step[0])


@dataclass(frozen=True)
class BlockGeometry:
    """A tile of output pixels and tile_n x 8 images in shared memory.

    regions: the input's, that of each inner map, the output's (which has no place there). turns: tiles that a
    block does one below the other.
    """

    tile_n: int
    turns: int
    regions: tuple[Region, ...]
    shared_bytes: int

    @classmethod
    def of(
        cls,
        step: BlockStep,
        slots: Sequence[int],
        input_hw: tuple[int, int],
        tile_hw: tuple[int, int],
        tile_n: int,
        turns: int = 1,
    ) -> BlockGeometry | None:
        """slots: of every region but the last. None where the kernel cannot count or reach that far."""
        maps = [input_hw]
        for conv in step.convs:
            maps.append(conv.spec.output_hw(maps[-1]))
        # From the output back to the input: how many pixels, and where they begin.
        shapes = [(tile_hw, (1, 1), (0, 0))]
        for conv in reversed(step.convs):
            (size, steps, shifts), spec = shapes[0], conv.spec
            before = [
                (
                    (size[i] - 1) * spec.stride[i] + (spec.kernel_size[i] - 1) * spec.dilation[i] + 1,
                    steps[i] * spec.stride[i],
                    shifts[i] * spec.stride[i] - spec.padding[i],
                )
                for i in (0, 1)
            ]
            shapes.insert(0, tuple(zip(*before, strict=True)))  # type: ignore[arg-type]
        regions: list[Region] = []
        end = 0
        for number, (size, steps, shifts) in enumerate(shapes):
            pieces = size[0] * size[1] * tile_n
            if pieces > MOST_CHUNKS or max(size[1], tile_n) > LARGEST_DIVISOR:
                return None
            channel_bytes = (pieces | 1) * _PIECE
            held = slots[number] if number < len(slots) else 0
            regions.append(Region(end, channel_bytes, *size, *maps[number], steps, shifts, held))
            end += held * channel_bytes
        made = cls(tile_n, turns, tuple(regions), end)
        return made if step.shortcut is None or made._holds(step.shortcut.spec) else None

    def _holds(self, shortcut: ConvSpec) -> bool:
        """Whether the input's region has all that the shortcut reads."""
        source, output = self.regions[0], self.regions[-1]
        sizes = (source.rows, output.rows), (source.columns, output.columns)
        for i, (there, needed) in enumerate(sizes):
            first = -source.shift[i] - shortcut.padding[i]
            reach = (needed - 1) * shortcut.stride[i] + (shortcut.kernel_size[i] - 1) * shortcut.dilation[i]
            if source.step[i] != shortcut.stride[i] or first < 0 or first + reach >= there:
                return False
        return True

    def table(self, tables: BlockTables, device: torch.device) -> tuple[Tensor, list[int]]:
        """The int32 table of a launch and the part of the op's sizes that follows from both."""
        targets, added = tables.static
        tile_records: list[int] = []
        offsets: list[int] = []
        conv_sizes: list[list[int]] = []
        count = sum(len(tiles) for tiles in tables.tiles)
        offsets_at = 4 * count + len(tables.channels) + 2 * len(targets)
        weight, first_row = 0, 0
        for number, (conv, tiles) in enumerate(zip(tables.step.convs, tables.tiles, strict=True)):
            spec = conv.spec
            conv_sizes.append(
                [
                    *(len(tiles), len(tile_records), first_row, *spec.stride),
                    list(ACTIVATIONS).index(spec.activation),
                ]
            )
            for tile in tiles:
                steps = len(tile.rows) // _STEP, len(tile.second_rows) // _STEP
                tile_records += [weight, *steps, offsets_at + len(offsets)]
                offsets += self._offsets(tile.rows, number, (0, 0))
                offsets += self._offsets(tile.second_rows, 0, self._shortcut_shift(tables.step))
                weight += sum(steps) * tables.filters // 16 * 32
                first_row += tables.filters
        head = len(tile_records)
        table = [*tile_records, *tables.channels, *targets, *added, *offsets]
        shortcut = tables.step.shortcut.spec.stride if tables.step.shortcut else (1, 1)
        residual = 1 if tables.step.adds_input else 2 if len(tables.step.inputs) == 2 else 0
        sizes = [
            *(self.tile_n, self.turns, self.shared_bytes, len(tables.tiles), residual, head),
            head + len(tables.channels),
            head + len(tables.channels) + len(targets),
            len(table),
            *shortcut,
            *(value for region in self.regions for value in region.numbers()),
            *(value for one in conv_sizes for value in one),
        ]
        return torch.tensor(table, dtype=torch.int32).to(device), sizes

    def _offsets(self, rows: Sequence[Row], number: int, shift: tuple[int, int]) -> list[int]:
        region = self.regions[number]
        return [
            region.offset
            + slot * region.channel_bytes
            + ((y + shift[0]) * region.columns + x + shift[1]) * self.tile_n * _PIECE
            for slot, y, x in rows
        ]

    def _shortcut_shift(self, step: BlockStep) -> tuple[int, int]:
        """From the first pixel of the input's region to the first that the shortcut reads."""
        if step.shortcut is None:
            return 0, 0
        shift, padding = self.regions[0].shift, step.shortcut.spec.padding
        return -shift[0] - padding[0], -shift[1] - padding[1]
