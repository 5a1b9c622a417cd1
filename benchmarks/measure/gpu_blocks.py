"""Per residual block of a network on a GPU: as one kernel and as one per convolution, beside its floor.

Timed like single convolutions (gpu_layers.py). What the planner would leave per convolution is timed as one
kernel too, where it fits: the numbers are there to set the planner's constants.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.program.steps import Program
from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock, why_no_blocks
from dsp_kernels.run.gpu.cuda.blocks.cost import best_geometry, device_model
from dsp_kernels.run.gpu.cuda.blocks.plan import plan_blocks, variants
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep, residual_last
from dsp_kernels.run.gpu.cuda.blocks.tables import block_tables
from dsp_kernels.run.gpu.layout import GpuLayout, layout_for_batch

from .floors import part_floor
from .gpu_layers import layer_times, replayed_seconds, value_sets
from .peaks import Peaks

__all__ = ["BlockTime", "block_times"]


@dataclass(frozen=True)
class BlockTime:
    """One block, or a part of one, as one kernel. Times in seconds of one launch, medians of many replays.

    per_conv: sum of its convolutions with a kernel each; predicted, predicted_per_conv: by the planner's
    model; floor: of one kernel, with measured peaks; chosen: whether the planner chose it.
    """

    block: str
    what: str
    batch: int
    seconds: float
    per_conv: float
    floor: float
    predicted: float
    predicted_per_conv: float
    chosen: bool
    tile: tuple[int, int, int]
    turns: int
    filters: int
    shared_bytes: int

    @property
    def fraction(self) -> float:
        """Of the floor; 1 cannot be beaten."""
        return self.floor / self.seconds


def block_times(program: Program, batch: int, dtype: torch.dtype, peaks: Peaks) -> Iterator[BlockTime]:
    """Times every residual block of a Program, and every part of it that the planner considers.

    batch: a multiple of 8. Raises DSPBackendError where blocks cannot run.
    """
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else None
    if device is None:
        raise DSPBackendError("block times need a CUDA device, and torch finds none")
    if reason := why_no_blocks(dtype, device, layout_for_batch(batch)):
        raise DSPBackendError(f"blocks cannot run as one kernel: {reason}")
    program = residual_last(program)
    shapes = {name: (batch, *shape[1:]) for name, shape in program.shapes.items()}
    single = {time.layer: time.seconds for time in layer_times(program, batch, dtype, peaks, "cuda")}
    model = device_model(device)
    for plan in plan_blocks(program, shapes, model):
        for step in variants(plan.block):
            step = step.map_tensors(lambda tensor: tensor.to(device, dtype))
            assert isinstance(step, BlockStep)
            tables = block_tables(step, dtype, device)
            found = best_geometry(tables, shapes, model)
            if found is None:
                continue
            geometry, predicted = found
            names = [*step.inputs, step.output]
            sets = value_sets([shapes[name] for name in names], GpuLayout.CHWN, dtype, device)
            output = geometry.regions[-1]
            yield BlockTime(
                plan.block.output,
                step.describe(),
                batch,
                replayed_seconds(CudaBlock(step, tables, geometry), sets, len(step.inputs) == 2),
                sum(single[member.output] for member in step.members),
                part_floor(program, list(step.members), batch, peaks, dtype),
                predicted,
                plan.per_conv,
                plan.step is not None
                and [m.output for m in plan.step.members] == [m.output for m in step.members],
                (output.rows, output.columns, 8 * geometry.tile_n),
                geometry.turns,
                tables.filters,
                geometry.shared_bytes,
            )
