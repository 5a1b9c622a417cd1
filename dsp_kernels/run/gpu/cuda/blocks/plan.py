"""Which residual blocks of a Program run as one kernel: all of a block, a part of it, or none."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from dsp_kernels.errors import DSPError
from dsp_kernels.program.steps import ConvStep, Program, TorchStep
from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock, why_no_blocks
from dsp_kernels.run.gpu.cuda.blocks.cost import (
    DeviceModel,
    Shapes,
    block_floor,
    block_seconds,
    conv_seconds,
    device_model,
)
from dsp_kernels.run.gpu.cuda.blocks.geometry import BlockGeometry
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep, blocks_of, residual_last, with_blocks
from dsp_kernels.run.gpu.cuda.blocks.tables import BlockTables, block_tables
from dsp_kernels.run.gpu.layout import BATCH_MULTIPLE, GpuConv, GpuLayout, layout_for_batch, round_up
from dsp_kernels.run.gpu.memory import value_shapes
from dsp_kernels.run.lru import LRU

_MOST_SHAPES = 8  # input shapes whose blocks are kept

MakeTables = Callable[[BlockStep], BlockTables]


@dataclass(frozen=True)
class BlockPlan:
    """The decision for one residual block. step: what runs as one kernel, possibly a part of the block.

    geometry: None where every convolution keeps its own kernel. seconds: of the whole block as decided;
    per_conv: with one kernel per convolution; floor: of one kernel for the whole block. All are predictions.
    """

    block: BlockStep
    step: BlockStep | None
    geometry: BlockGeometry | None
    seconds: float
    per_conv: float
    floor: float

    def describe(self) -> str:
        """The decision, the floor and the predicted times, in microseconds."""
        times = f"floor {1e6 * self.floor:.1f} us, per convolution {1e6 * self.per_conv:.1f} us"
        if self.step is None or self.geometry is None:
            return f"block left per convolution ({times}; estimates)"
        output = self.geometry.regions[-1]
        is_whole = self.step.members == self.block.members
        what = "one kernel" if is_whole else f"one kernel for a {self.step.describe()}"
        return (
            f"{what}: predicted {1e6 * self.seconds:.1f} us ({times}; estimates), tiles of "
            f"{output.rows}x{output.columns} pixels x {BATCH_MULTIPLE * self.geometry.tile_n} images, "
            f"{self.geometry.turns} turns, {self.geometry.shared_bytes} bytes of shared memory"
        )


def blocks_wanted() -> bool:
    """DSP_KERNELS_BLOCKS: 1 (or unset) for blocks where the model predicts a gain, 0 for none.

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


_half_tables = partial(block_tables, dtype=torch.float16, device=torch.device("cpu"))


def plan_blocks(
    program: Program, shapes: Shapes, device: DeviceModel, make_tables: MakeTables = _half_tables
) -> list[BlockPlan]:
    """A plan per residual block of a Program in the form of ``residual_last``.

    shapes: of every value (batch, channels, height, width), the batch a multiple of 8.
    """
    return [_plan(block, shapes, device, make_tables) for block in blocks_of(program)]


def _plan(block: BlockStep, shapes: Shapes, device: DeviceModel, make_tables: MakeTables) -> BlockPlan:
    alone = {conv.output: conv_seconds(conv, shapes, device) for conv in block.members}
    per_conv = sum(alone.values())
    plan = BlockPlan(block, None, None, per_conv, per_conv, block_floor(block, shapes, device))
    for step in variants(block):
        found = best_geometry(make_tables(step), shapes, device)
        if found is None:
            continue
        inside = {member.output for member in step.members}
        seconds = found[1] + sum(time for output, time in alone.items() if output not in inside)
        if seconds < plan.seconds:
            plan = replace(plan, step=step, geometry=found[0], seconds=seconds)
    return plan


def best_geometry(
    tables: BlockTables, shapes: Shapes, device: DeviceModel
) -> tuple[BlockGeometry, float] | None:
    """The geometry with the least predicted time, and that time; None where nothing fits."""
    step = tables.step
    x, out = shapes[step.inputs[0]], shapes[step.output]
    assert x is not None
    assert out is not None
    chunks = x[0] // BATCH_MULTIPLE
    best: tuple[BlockGeometry, float] | None = None
    for tile_n in (n for n in (1, 2, 4) if n <= max(chunks, 1)):
        for rows in _tile_sizes(out[2], 16):
            for columns in _tile_sizes(out[3], 64):
                made = BlockGeometry.of(step, tables.slots, (x[2], x[3]), (rows, columns), tile_n)
                if made is None or made.shared_bytes > device.shared_per_block:
                    break  # wider tiles need more
                below = math.ceil(out[2] / rows)
                beside = math.ceil(out[3] / columns) * math.ceil(chunks / tile_n)
                # One turn, all, and as many as leave one or two thread blocks for every multiprocessor.
                some = (below * beside // (device.multiprocessors * resident) for resident in (1, 2))
                for turns in sorted({1, below, *(min(max(count, 1), below) for count in some)}):
                    made = replace(made, turns=turns)
                    seconds = block_seconds(tables, made, shapes, device)
                    if seconds is not None and (best is None or seconds < best[1]):
                        best = made, seconds
    return best


def _tile_sizes(size: int, largest: int) -> list[int]:
    """Tile sizes that split an axis into 1, 2, 3 ... tiles, up to ``largest``."""
    return sorted({math.ceil(size / count) for count in range(1, size + 1)} & set(range(1, largest + 1)))


class BlockPlanner:
    """Plans the blocks of one Program per input shape, and prepares their launchers.

    Weights are arranged once per block; the geometry in shared memory depends on the shape, of which the
    latest are kept.
    """

    def __init__(
        self, program: Program, dtype: torch.dtype, device: torch.device, wanted: bool = True
    ) -> None:
        self._program, self._reordered = program, residual_last(program)
        self._dtype, self._device, self._wanted = dtype, device, wanted
        self._cpu_tables: dict[tuple[str, ...], BlockTables] = {}
        self._device_tables: dict[tuple[str, ...], BlockTables] = {}
        self._planned: LRU[tuple[Program, dict[str, GpuConv]]] = LRU(_MOST_SHAPES)
        self._batches: LRU[int] = LRU(_MOST_SHAPES)

    def can_run(self, layout: GpuLayout) -> bool:
        """Whether any block can run as one kernel in this layout."""
        return self._wanted and not why_no_blocks(self._dtype, self._device, layout)

    def batch_for(self, shape: Sequence[int]) -> int:
        """The batch to run an input of this shape with: its own, or the next multiple of 8 if that is faster.

        The added images are uninitialised; no other image depends on them. A TorchStep may mix images, so
        such a Program always runs with its own batch.
        """
        if shape[0] % BATCH_MULTIPLE == 0 or not self.can_run(GpuLayout.CHWN):
            return shape[0]
        return self._batches.get_or_make(tuple(shape), lambda: self._faster_batch(shape))

    def _faster_batch(self, shape: Sequence[int]) -> int:
        batch = shape[0]
        if any(isinstance(step, TorchStep) for step in self._program.steps):
            return batch
        device = device_model(self._device)
        convs = [step for step in self._reordered.steps if isinstance(step, ConvStep)]
        padded_batch = round_up(batch, BATCH_MULTIPLE)
        own = value_shapes(self._program, shape, self._dtype)
        padded = value_shapes(self._program, (padded_batch, *shape[1:]), self._dtype)
        seconds = sum(conv_seconds(conv, padded, device) for conv in convs)
        seconds -= sum(plan.per_conv - plan.seconds for plan in self.plans(padded))
        return padded_batch if seconds < sum(conv_seconds(conv, own, device) for conv in convs) else batch

    def is_planned(self, shape: Sequence[int]) -> bool:
        """Whether everything for an input of this shape is on the device already."""
        return not self.can_run(layout_for_batch(shape[0])) or self._planned.get(tuple(shape)) is not None

    def program_for(self, shape: Sequence[int]) -> tuple[Program, dict[str, GpuConv]]:
        """The Program for an input of this shape (batch first), and the launcher of every BlockStep in it."""
        if not self.can_run(layout_for_batch(shape[0])):
            return self._program, {}
        return self._planned.get_or_make(tuple(shape), lambda: self._prepare(shape))

    def plans(self, shapes: Shapes) -> list[BlockPlan]:
        """The plan of every block for values of these shapes."""
        return plan_blocks(self._reordered, shapes, device_model(self._device), self._tables)

    def _prepare(self, shape: Sequence[int]) -> tuple[Program, dict[str, GpuConv]]:
        launchers: dict[str, GpuConv] = {}
        fused = []
        for plan in self.plans(value_shapes(self._program, shape, self._dtype)):
            if plan.step is not None and plan.geometry is not None:
                fused.append(plan.step)
                tables = self._tables_on_device(plan.step)
                launchers[plan.step.output] = CudaBlock(plan.step, tables, plan.geometry)
        return with_blocks(self._reordered, fused), launchers

    def _tables(self, step: BlockStep) -> BlockTables:
        """On the CPU: more variants are planned than run."""
        key = tuple(member.output for member in step.members)
        if key not in self._cpu_tables:
            self._cpu_tables[key] = block_tables(step, self._dtype, torch.device("cpu"))
        return self._cpu_tables[key]

    def _tables_on_device(self, step: BlockStep) -> BlockTables:
        key = tuple(member.output for member in step.members)
        if key not in self._device_tables:
            made = self._tables(step)
            weights, bias = made.weights.to(self._device), made.bias.to(self._device)
            self._device_tables[key] = replace(made, weights=weights, bias=bias)
        return self._device_tables[key]
