"""How a residual block could run as one kernel: all of it or a part, and in which tiles.

A few lines of counting select what is worth measuring (gpu/tune.py).
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import torch

from dsp_kernels.errors import DSPError
from dsp_kernels.run.gpu.cuda.blocks.geometry import BlockGeometry
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep
from dsp_kernels.run.gpu.cuda.blocks.tables import block_channels
from dsp_kernels.run.gpu.layout import BATCH_MULTIPLE

Shapes = Mapping[str, tuple[int, ...] | None]


class Limits(NamedTuple):
    """Of a GPU; shared memory in bytes."""

    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int


H200 = Limits(132, 232448, 233472)  # data sheet


def limits_of(device: torch.device) -> Limits:
    """H200 for a CPU."""
    if device.type != "cuda":
        return H200
    found = torch.cuda.get_device_properties(device)
    return Limits(
        found.multi_processor_count,
        found.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        found.shared_memory_per_multiprocessor,
    )


def blocks_wanted() -> bool:
    """DSP_KERNELS_BLOCKS: 1 (or unset) measures residual blocks as one kernel too, 0 never uses them.

    Raises DSPError for another value.
    """
    value = os.environ.get("DSP_KERNELS_BLOCKS", "1")
    if value not in ("0", "1"):
        raise DSPError(f"DSP_KERNELS_BLOCKS is {value!r}; expected 0 or 1")
    return value == "1"


def variants(block: BlockStep) -> list[BlockStep]:
    """What of a block can run as one kernel: all, all but the shortcut, all but the first convolution."""
    found = [block]
    x = block.inputs[0]
    residual = block.shortcut.output if block.shortcut else block.inputs[-1]
    if block.shortcut:
        found.append(replace(block, inputs=(x, residual), shortcut=None))
    if len(block.convs) == 3:
        tail = block.convs[1:]
        found.append(replace(block, inputs=(tail[0].inputs[0], residual), convs=tail, shortcut=None))
    return found


def block_options(
    block: BlockStep, shapes: Shapes, limits: Limits
) -> dict[str, tuple[BlockStep, BlockGeometry]]:
    """By name, what is worth measuring: per variant and number of images of a tile, the best geometry.

    shapes: of every value (batch, channels, height, width), the batch a multiple of 8.
    """
    found = {}
    for step in variants(block):
        best: dict[int, tuple[float, BlockGeometry]] = {}
        for geometry in _geometries(step, shapes, limits):
            cost = _cost(step, geometry, shapes, limits)
            if geometry.tile_n not in best or cost < best[geometry.tile_n][0]:
                best[geometry.tile_n] = cost, geometry
        for _, geometry in best.values():
            output, images = geometry.regions[-1], BATCH_MULTIPLE * geometry.tile_n
            tile = f"{output.rows}x{output.columns}x{images}"
            found[f"one {step.describe()}: tiles {tile}, {geometry.turns} turns"] = step, geometry
    return found


def _geometries(step: BlockStep, shapes: Shapes, limits: Limits) -> Iterator[BlockGeometry]:
    """Everything that fits into shared memory."""
    x, out = shapes[step.inputs[0]], shapes[step.output]
    assert x is not None
    assert out is not None
    slots = [len(channels) for channels in block_channels(step)[:-1]]
    chunks = x[0] // BATCH_MULTIPLE
    for tile_n in (n for n in (1, 2, 4) if n <= max(chunks, 1)):
        for rows in _tile_sizes(out[2], 16):
            for columns in _tile_sizes(out[3], 64):
                made = BlockGeometry.of(step, slots, (x[2], x[3]), (rows, columns), tile_n)
                if made is None or made.shared_bytes > limits.shared_per_block:
                    break  # wider tiles need more
                below = math.ceil(out[2] / rows)
                blocks = below * math.ceil(out[3] / columns) * math.ceil(chunks / tile_n)
                # One turn, all, and as many as leave one or two thread blocks for every multiprocessor.
                some = (blocks // (limits.multiprocessors * resident) for resident in (1, 2))
                for turns in sorted({1, below, *(min(max(count, 1), below) for count in some)}):
                    yield replace(made, turns=turns)


def _cost(step: BlockStep, geometry: BlockGeometry, shapes: Shapes, limits: Limits) -> float:
    """Multiply-adds of the busiest multiprocessor, pixels computed twice included.

    A thread block that has a multiprocessor for itself waits at every barrier, which counts as half more.
    """
    batch, _, height, width = shapes[step.output] or (0, 0, 0, 0)
    output, turns, tile_n = geometry.regions[-1], geometry.turns, geometry.tile_n
    blocks = math.ceil(height / (output.rows * turns)) * math.ceil(width / output.columns)
    blocks *= math.ceil(batch / (BATCH_MULTIPLE * tile_n))
    work = 0
    for conv, region in zip(step.convs, geometry.regions[1:], strict=True):
        rows = region.rows + (turns - 1) * (region.rows - region.kept)
        work += conv.spec.structure.macs(conv.spec.kernel_size, (rows, region.columns)) * tile_n
    # Two fit by registers; each reserves 1024 more bytes of shared memory.
    resident = min(2, limits.shared_per_multiprocessor // (geometry.shared_bytes + 1024))
    return math.ceil(blocks / limits.multiprocessors) * work * (1.0 if resident == 2 else 1.5)


def _tile_sizes(size: int, largest: int) -> list[int]:
    """Tile sizes that split an axis into 1, 2, 3 ... tiles, up to ``largest``."""
    return sorted({math.ceil(size / count) for count in range(1, size + 1)} & set(range(1, largest + 1)))
