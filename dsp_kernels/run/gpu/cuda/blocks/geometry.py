"""The regions of a residual block in shared memory, and the launch table that describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.gpu.cuda.blocks.step import MOST_CONVS, BlockStep
from dsp_kernels.run.gpu.cuda.blocks.tables import STEP, BlockTables, Row
from dsp_kernels.run.gpu.cuda.launch import (
    LARGEST_DIVISOR,
    MOST_CHUNKS,
    RESIDUAL_CODES,
    BlockConv,
    BlockRegion,
    BlockSizes,
)
from dsp_kernels.run.gpu.layout import ACTIVATION_CODES

_PIECE = 16  # bytes of eight images


def _reciprocal(divisor: int) -> int:
    """See divide_small in csrc/cuda/block_kernel.cuh."""
    return -(-(1 << 20) // divisor)


@dataclass(frozen=True)
class BlockGeometry:
    """A tile of output pixels and tile_n x 8 images in shared memory.

    regions: of the input, of each inner feature map, of the output (not in shared memory). turns: tiles
    that a thread block computes one below the other.
    """

    tile_n: int
    turns: int
    regions: tuple[BlockRegion, ...]
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
        regions: list[BlockRegion] = []
        end = 0
        for number, (size, steps, shifts) in enumerate(shapes):
            pieces = size[0] * size[1] * tile_n
            if pieces > MOST_CHUNKS or max(size[1], tile_n) > LARGEST_DIVISOR:
                return None
            channel_bytes = (pieces | 1) * _PIECE
            held = slots[number] if number < len(slots) else 0
            kept = max(0, size[0] - tile_hw[0] * steps[0])  # rows that the next turn reuses
            place = *size, *maps[number], *steps, *shifts
            regions.append(BlockRegion(end, channel_bytes, *place, held, kept, _reciprocal(size[1])))
            end += held * channel_bytes
        made = cls(tile_n, turns, tuple(regions), end)
        return made if step.shortcut is None or made._holds(step.shortcut.spec) else None

    def _holds(self, shortcut: ConvSpec) -> bool:
        """Whether the input region contains everything that the shortcut reads."""
        source, output = self.regions[0], self.regions[-1]
        axes = (
            (source.rows, output.rows, source.step_y, source.shift_y),
            (source.columns, output.columns, source.step_x, source.shift_x),
        )
        for i, (there, needed, step, shift) in enumerate(axes):
            first = -shift - shortcut.padding[i]
            reach = (needed - 1) * shortcut.stride[i] + (shortcut.kernel_size[i] - 1) * shortcut.dilation[i]
            if step != shortcut.stride[i] or first < 0 or first + reach >= there:
                return False
        return True

    def table(self, tables: BlockTables, device: torch.device) -> tuple[Tensor, BlockSizes]:
        """The int32 table of a launch, and its struct without the batch."""
        step, targets = tables.step, tables.targets
        tile_records: list[int] = []
        offsets: list[int] = []
        convs: list[BlockConv] = []
        count = sum(len(tiles) for tiles in tables.tiles)
        channels_at = 4 * count
        targets_at = channels_at + len(tables.channels)
        residuals_at = targets_at + len(targets)
        offsets_at = residuals_at + len(targets)
        weight, first_row = 0, 0
        source = self.regions[0]
        padding, shortcut_stride = (0, 0), (1, 1)
        if step.shortcut:
            padding, shortcut_stride = step.shortcut.spec.padding, step.shortcut.spec.stride
        # Offset in pixels of the first input that the shortcut reads within the input region.
        shift = -source.shift_y - padding[0], -source.shift_x - padding[1]
        for number, (conv, tiles) in enumerate(zip(step.convs, tables.tiles, strict=True)):
            code = ACTIVATION_CODES[conv.spec.activation]
            convs.append(BlockConv(len(tiles), len(tile_records), first_row, *conv.spec.stride, code))
            for tile in tiles:
                steps = len(tile.rows) // STEP, len(tile.second_rows) // STEP
                tile_records += [weight, *steps, offsets_at + len(offsets)]
                offsets += self._offsets(tile.rows, number, (0, 0))
                offsets += self._offsets(tile.second_rows, 0, shift)
                weight += sum(steps) * tables.filters // 16 * 32
                first_row += tables.filters
        table = [*tile_records, *tables.channels, *targets, *tables.added, *offsets]
        residual = "input" if step.adds_input else "tensor" if len(step.inputs) == 2 else "none"
        missing = MOST_CONVS - len(convs)
        sizes = BlockSizes(
            filters=tables.filters,
            batch=0,
            in_channels=step.convs[0].spec.structure.in_channels,
            out_channels=step.convs[-1].spec.structure.out_channels,
            tile_n=self.tile_n,
            turns=self.turns,
            shared_bytes=self.shared_bytes,
            conv_count=len(convs),
            residual_kind=RESIDUAL_CODES[residual],
            channels_at=channels_at,
            targets_at=targets_at,
            residuals_at=residuals_at,
            table_size=len(table),
            shortcut_stride_y=shortcut_stride[0],
            shortcut_stride_x=shortcut_stride[1],
            by_tile_n=_reciprocal(self.tile_n),
            regions=self.regions + (BlockRegion(*[0] * len(BlockRegion._fields)),) * missing,
            convs=tuple(convs) + (BlockConv(*[0] * len(BlockConv._fields)),) * missing,
        )
        return torch.tensor(table, dtype=torch.int32).to(device), sizes

    def _offsets(self, rows: Sequence[Row], number: int, shift: tuple[int, int]) -> list[int]:
        region = self.regions[number]
        return [
            region.offset
            + slot * region.channel_bytes
            + ((y + shift[0]) * region.columns + x + shift[1]) * self.tile_n * _PIECE
            for slot, y, x in rows
        ]
