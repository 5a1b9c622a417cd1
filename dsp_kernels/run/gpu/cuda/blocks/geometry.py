"""The regions of a residual block in shared memory, and the launch table that describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep
from dsp_kernels.run.gpu.cuda.blocks.tables import STEP, BlockTables, Row
from dsp_kernels.run.gpu.layout import ACTIVATION_CODES

_MOST_CHUNKS, _LARGEST_DIVISOR = 4095, 256  # csrc/cuda/block_kernel.h
_PIECE = 16  # bytes of eight images


@dataclass(frozen=True)
class Region:
    """See BlockRegion in csrc/cuda/block_kernel.h; sizes in pixels, offset and channel_bytes in bytes."""

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
        before = self.offset, self.channel_bytes, self.rows, self.columns, self.height, self.width
        return [*before, *self.step, *self.shift, self.slots]

    def kept(self, rows: int) -> int:
        """Rows that the next turn reuses, if each turn computes ``rows`` rows of output."""
        return max(0, self.rows - rows * self.step[0])


@dataclass(frozen=True)
class BlockGeometry:
    """A tile of output pixels and tile_n x 8 images in shared memory.

    regions: of the input, of each inner feature map, of the output (not in shared memory). turns: tiles
    that a thread block computes one below the other.
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
        """slots: of every region but the last. None if it exceeds the kernel's limits."""
        maps = [input_hw]
        for conv in step.convs:
            maps.append(conv.spec.output_hw(maps[-1]))
        # From the output back to the input: size in pixels, step and shift relative to the output.
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
            if pieces > _MOST_CHUNKS or max(size[1], tile_n) > _LARGEST_DIVISOR:
                return None
            channel_bytes = (pieces | 1) * _PIECE
            held = slots[number] if number < len(slots) else 0
            regions.append(Region(end, channel_bytes, *size, *maps[number], steps, shifts, held))
            end += held * channel_bytes
        made = cls(tile_n, turns, tuple(regions), end)
        return made if step.shortcut is None or made._holds(step.shortcut.spec) else None

    def _holds(self, shortcut: ConvSpec) -> bool:
        """Whether the input region contains everything that the shortcut reads."""
        source, output = self.regions[0], self.regions[-1]
        sizes = (source.rows, output.rows), (source.columns, output.columns)
        for i, (there, needed) in enumerate(sizes):
            first = -source.shift[i] - shortcut.padding[i]
            reach = (needed - 1) * shortcut.stride[i] + (shortcut.kernel_size[i] - 1) * shortcut.dilation[i]
            if source.step[i] != shortcut.stride[i] or first < 0 or first + reach >= there:
                return False
        return True

    def table(self, tables: BlockTables, device: torch.device) -> tuple[Tensor, list[int]]:
        """The int32 table of a launch, and the op's sizes from tile_n on (csrc/cuda/block_plan.h)."""
        targets = tables.targets
        tile_records: list[int] = []
        offsets: list[int] = []
        conv_sizes: list[int] = []
        count = sum(len(tiles) for tiles in tables.tiles)
        offsets_at = 4 * count + len(tables.channels) + 2 * len(targets)
        weight, first_row = 0, 0
        shortcut, source = tables.step.shortcut, self.regions[0]
        padding = shortcut.spec.padding if shortcut else (0, 0)
        # Offset in pixels of the first input that the shortcut reads within the input region.
        shift = -source.shift[0] - padding[0], -source.shift[1] - padding[1]
        for number, (conv, tiles) in enumerate(zip(tables.step.convs, tables.tiles, strict=True)):
            spec = conv.spec
            conv_sizes += [len(tiles), len(tile_records), first_row, *spec.stride]
            conv_sizes.append(ACTIVATION_CODES[spec.activation])
            for tile in tiles:
                steps = len(tile.rows) // STEP, len(tile.second_rows) // STEP
                tile_records += [weight, *steps, offsets_at + len(offsets)]
                offsets += self._offsets(tile.rows, number, (0, 0))
                offsets += self._offsets(tile.second_rows, 0, shift)
                weight += sum(steps) * tables.filters // 16 * 32
                first_row += tables.filters
        head = len(tile_records)
        table = [*tile_records, *tables.channels, *targets, *tables.added, *offsets]
        residual = 1 if tables.step.adds_input else 2 if len(tables.step.inputs) == 2 else 0
        sizes = [
            *(self.tile_n, self.turns, self.shared_bytes, len(tables.tiles), residual, head),
            head + len(tables.channels),
            head + len(tables.channels) + len(targets),
            len(table),
            *(shortcut.spec.stride if shortcut else (1, 1)),
            *(value for region in self.regions for value in region.numbers()),
            *conv_sizes,
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
