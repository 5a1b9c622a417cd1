"""Per residual block of a Program: one kernel for it, one for a part of it, or one per convolution."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import torch

from dsp_kernels.errors import DSPError
from dsp_kernels.program.steps import Program
from dsp_kernels.run.gpu.cuda.blocks.cost import (
    BlockPlan,
    DeviceModel,
    Shapes,
    best_geometry,
    block_floor,
    total_conv_seconds,
)
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep, blocks_of
from dsp_kernels.run.gpu.cuda.blocks.tables import BlockTables, block_tables

__all__ = ["MakeTables", "blocks_wanted", "plan_blocks", "variants"]

MakeTables = Callable[[BlockStep], BlockTables]


def blocks_wanted() -> bool:
    """What DSP_KERNELS_BLOCKS says: 1 (or unset) for blocks where the model predicts a gain, 0 for none.

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


def plan_blocks(
    program: Program,
    shapes: Shapes,
    device: DeviceModel,
    dtype: torch.dtype = torch.float16,
    make_tables: MakeTables | None = None,
) -> list[BlockPlan]:
    """A plan per residual block of a Program as ``residual_last`` gives it.

    shapes: of every value (batch, channels, height, width), batch a multiple of 8. dtype: of the blocks'
    tensors. make_tables: where they are kept between calls.
    """
    make = make_tables or (lambda step: block_tables(step, dtype, torch.device("cpu")))
    return [_plan(block, shapes, device, make) for block in blocks_of(program)]


def _plan(block: BlockStep, shapes: Shapes, device: DeviceModel, make: MakeTables) -> BlockPlan:
    per_conv = total_conv_seconds(block.members, shapes, device)
    plan = BlockPlan(block, None, None, None, per_conv, per_conv, block_floor(block, shapes, device))
    for step in variants(block):
        tables = make(step)
        found = best_geometry(tables, shapes, device)
        if found is None:
            continue
        kept = {member.output for member in step.members}
        rest = [conv for conv in block.members if conv.output not in kept]
        seconds = found[1] + total_conv_seconds(rest, shapes, device)
        if seconds < plan.seconds:
            plan = replace(plan, step=step, tables=tables, geometry=found[0], seconds=seconds)
    return plan
