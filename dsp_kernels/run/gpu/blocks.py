"""Which residual blocks of a Program run as one kernel on a GPU, per input size, and their launchers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from dsp_kernels.program.steps import ConvStep, Program, TorchStep
from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock, why_no_blocks
from dsp_kernels.run.gpu.cuda.blocks.cost import BlockPlan, Shapes, conv_seconds, device_model
from dsp_kernels.run.gpu.cuda.blocks.plan import blocks_wanted, plan_blocks
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep, residual_last, with_blocks
from dsp_kernels.run.gpu.cuda.blocks.tables import BlockTables, block_tables
from dsp_kernels.run.gpu.graphs import LRU
from dsp_kernels.run.gpu.layout import BATCH_MULTIPLE, GpuConv, GpuLayout, layout_for_batch
from dsp_kernels.run.gpu.memory import value_shapes

__all__ = ["GpuBlocks"]


class GpuBlocks:
    """The blocks of one Program. wanted: None asks DSP_KERNELS_BLOCKS.

    Weights are arranged once per block; where everything lies in shared memory is decided per input size, of
    which the latest ``most_sizes`` are kept.
    """

    def __init__(
        self,
        program: Program,
        dtype: torch.dtype,
        device: torch.device,
        wanted: bool | None = None,
        most_sizes: int = 8,
    ) -> None:
        self._program = program
        self._kind = dtype, device
        self._wanted = blocks_wanted() if wanted is None else wanted
        self._tables: dict[tuple[str, ...], BlockTables] = {}
        self._on_device: dict[tuple[str, ...], BlockTables] = {}
        self._sizes: LRU[tuple[Program, dict[str, GpuConv]]] = LRU(most_sizes)
        self._batches: dict[tuple[int, ...], int] = {}

    def can_run(self, layout: GpuLayout) -> bool:
        """Whether any block can run as one kernel in this layout."""
        return self._wanted and not why_no_blocks(*self._kind, layout)

    def batch_for(self, shape: Sequence[int]) -> int:
        """The batch to run an input of this shape with: its own, or the next multiple of 8 if that gains.

        What lies in the images that fill up is never read: images do not know each other. Where a step is
        somebody's own operation they may, so such a Program runs with its own batch.
        """
        batch, key = shape[0], tuple(shape)
        if batch % BATCH_MULTIPLE == 0 or not self.can_run(GpuLayout.CHWN):
            return batch
        if key not in self._batches:
            self._batches[key] = self._cheaper_batch(shape)
        return self._batches[key]

    def _cheaper_batch(self, shape: Sequence[int]) -> int:
        batch, size = shape[0], shape[1:]
        if any(isinstance(step, TorchStep) for step in self._program.steps):
            return batch
        device, dtype = device_model(self._kind[1]), self._kind[0]
        convs = [step for step in residual_last(self._program).steps if isinstance(step, ConvStep)]
        own = value_shapes(self._program, shape, dtype)
        full = -(-batch // BATCH_MULTIPLE) * BATCH_MULTIPLE
        filled = value_shapes(self._program, (full, *size), dtype)
        seconds = sum(conv_seconds(conv, filled, device) for conv in convs)
        seconds -= sum(plan.per_conv - plan.seconds for plan in self.plans(filled))
        return full if seconds < sum(conv_seconds(conv, own, device) for conv in convs) else batch

    def knows(self, shape: Sequence[int]) -> bool:
        """Whether everything for an input of this shape is on the device already."""
        return not self.can_run(layout_for_batch(shape[0])) or tuple(shape) in self._sizes

    def program_for(self, shape: Sequence[int]) -> tuple[Program, dict[str, GpuConv]]:
        """The Program for an input of this shape (batch first), and the launcher of every BlockStep in it."""
        if not self.can_run(layout_for_batch(shape[0])):
            return self._program, {}
        return self._sizes.get(tuple(shape), lambda: self._plan(shape))

    def plans(self, shapes: Shapes) -> list[BlockPlan]:
        """What is decided for values of these shapes."""
        return plan_blocks(
            residual_last(self._program), shapes, device_model(self._kind[1]), make_tables=self._tables_of
        )

    def _plan(self, shape: Sequence[int]) -> tuple[Program, dict[str, GpuConv]]:
        plans = self.plans(value_shapes(self._program, shape, self._kind[0]))
        fused = [
            (plan.step, CudaBlock(plan.step, self._there(plan.step), plan.geometry))
            for plan in plans
            if plan.step is not None and plan.geometry is not None
        ]
        program = with_blocks(residual_last(self._program), [step for step, _ in fused])
        return program, {step.output: block for step, block in fused}

    def _tables_of(self, step: BlockStep) -> BlockTables:
        """On the CPU: the planner looks at more parts of blocks than will run."""
        key = _key(step)
        if key not in self._tables:
            self._tables[key] = block_tables(step, self._kind[0], torch.device("cpu"))
        return self._tables[key]

    def _there(self, step: BlockStep) -> BlockTables:
        key, device = _key(step), self._kind[1]
        if key not in self._on_device:
            tables = self._tables_of(step)
            self._on_device[key] = replace(
                tables, weights=tables.weights.to(device), bias=tables.bias.to(device)
            )
        return self._on_device[key]


def _key(step: BlockStep) -> tuple[str, ...]:
    return (step.output, *(member.output for member in step.members))
