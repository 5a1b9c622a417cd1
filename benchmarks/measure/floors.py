"""The least time in which a machine of given peaks could run a network (the roofline).

A floor is max(FLOPs / peak, bytes / bandwidth) + launch. Bytes are the compulsory ones: every input, weight
and output once. Only the floor of the whole network as one kernel bounds every engine on a CPU, whose caches
can hold the feature maps between layers.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from dsp_kernels.graph.network import trace
from dsp_kernels.program.planner import plan
from dsp_kernels.program.steps import ConvStep, LinearStep, Program, Step

from .peaks import Peaks, dtype_name


def program_of(model: nn.Module, example: Tensor) -> Program:
    """The steps of a network, batch norms and activations folded. example: (n, channels, height, width)."""
    return plan(trace(model, example))


def part_floor(
    program: Program, part: Sequence[Step], batch: int, peaks: Peaks, dtype: torch.dtype = torch.float32
) -> float:
    """Seconds of some steps of a program as one kernel. dtype: one that ``peaks.knows``."""
    flops = 2 * batch * replace(program, steps=tuple(part)).macs
    moved = compulsory_bytes(program, part, batch, dtype)
    return max(flops / peaks.flops[dtype_name(dtype)], moved / peaks.bandwidth) + peaks.launch


def compulsory_bytes(program: Program, part: Sequence[Step], batch: int, dtype: torch.dtype) -> int:
    """Bytes that must be read and written if no tensor inside ``part`` leaves the chip."""
    written = {step.output for step in part}
    read = {name for step in part for name in step.inputs} - written
    outside = {name for step in program.steps if step.output not in written for name in step.inputs}
    tensors = read | (written & (outside | set(program.outputs)))
    numbers = sum(batch * math.prod(program.shapes[name][1:]) for name in tensors if name in program.shapes)
    for step in part:
        if isinstance(step, ConvStep):
            numbers += sum(weight.numel() for weight in step.weights)
        elif isinstance(step, LinearStep):
            numbers += step.weight.numel()
    return numbers * dtype.itemsize
