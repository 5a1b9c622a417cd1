"""How fast a network could possibly run on a machine of given peaks (the roofline, per launch).

A floor is max(FLOPs / peak, bytes / bandwidth) + launch for each kernel, summed. Bytes are the compulsory
ones: every input, residual, weight and output once. Three ways of cutting the network into kernels are
counted: one per convolution, one per residual block, one for the whole network. Only the last bounds every
engine on a CPU, whose caches can hold what passes between layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsp_kernels.graph.network import trace
from dsp_kernels.program.planner import plan
from dsp_kernels.program.steps import AddStep, ConvStep, LinearStep, Program, Step

from .peaks import Peaks

__all__ = ["Floors", "floors", "part_floor", "program_of", "step_floors"]


@dataclass(frozen=True)
class Floors:
    """Seconds for one batch: one kernel per conv, per residual block, for the whole network.

    moved: bytes that the last reads and writes.
    """

    per_conv: float
    per_block: float
    network: float
    moved: float


def program_of(model: nn.Module, example: Tensor) -> Program:
    """The steps of a network with norms and activations folded. example: (1, channels, height, width)."""
    return plan(trace(model, example))


def floors(program: Program, batch: int, peaks: Peaks, dtype: torch.dtype = torch.float32) -> Floors | None:
    """The floors for a batch; None where no peak of this dtype was measured."""
    if str(dtype).removeprefix("torch.") not in peaks.flops:
        return None

    def seconds(parts: list[list[Step]]) -> float:
        return sum(part_floor(program, part, batch, peaks, dtype) for part in parts)

    steps = list(program.steps)
    weighty: list[list[Step]] = [[step] for step in steps if isinstance(step, ConvStep | LinearStep)]
    moved = _bytes(program, steps, batch, dtype)
    return Floors(seconds(weighty), seconds(_blocks(steps)), seconds([steps]), moved)


def step_floors(
    program: Program, batch: int, peaks: Peaks, dtype: torch.dtype = torch.float32
) -> list[float]:
    """The floor of every step of a program as a kernel of its own; dtype must be one of ``peaks.flops``."""
    return [part_floor(program, [step], batch, peaks, dtype) for step in program.steps]


def part_floor(
    program: Program, part: list[Step], batch: int, peaks: Peaks, dtype: torch.dtype = torch.float32
) -> float:
    """The floor of some steps of a program, a residual block for example, as one kernel."""
    flops = 2 * batch * sum(_macs(program, step) for step in part)
    peak = peaks.flops[str(dtype).removeprefix("torch.")]
    return max(flops / peak, _bytes(program, part, batch, dtype) / peaks.bandwidth) + peaks.launch


def _blocks(steps: list[Step]) -> list[list[Step]]:
    """Cut after every residual addition; what is before, between and after are parts of their own."""
    parts: list[list[Step]] = [[]]
    for step in steps:
        parts[-1].append(step)
        if isinstance(step, AddStep) or (isinstance(step, ConvStep) and len(step.inputs) == 2):
            parts.append([])
    return [part for part in parts if part]


def _macs(program: Program, step: Step) -> int:
    if isinstance(step, ConvStep):
        height, width = program.shapes[step.output][2:]
        return step.spec.structure.macs(step.spec.kernel_size, (height, width))
    return step.weight.numel() if isinstance(step, LinearStep) else 0


def _bytes(program: Program, part: list[Step], batch: int, dtype: torch.dtype) -> float:
    """Bytes that must be read and written if nothing inside ``part`` leaves the chip."""
    written = {step.output for step in part}
    read = {name for step in part for name in step.inputs} - written
    inside = set(map(id, part))
    outside = {name for step in program.steps if id(step) not in inside for name in step.inputs}
    values = read | (written & (outside | {program.output}))
    numbers = sum(batch * math.prod(program.shapes[name][1:]) for name in values if name in program.shapes)
    for step in part:
        if isinstance(step, ConvStep):
            numbers += sum(weight.numel() for weight in step.weights)
        elif isinstance(step, LinearStep):
            numbers += step.weight.numel()
    return numbers * dtype.itemsize
