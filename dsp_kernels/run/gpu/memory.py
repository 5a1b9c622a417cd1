"""The memory plan of a Program on a GPU: shapes and lifetimes of its values, placed in one arena."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.op.activations import GATES
from dsp_kernels.program.steps import ConcatStep, ConvStep, ElementwiseStep, Program, SelectStep, Step
from dsp_kernels.run.eager.program import EagerExecutor
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep
from dsp_kernels.run.gpu.layout import round_up

_ALIGNMENT = 256  # bytes, as cudaMalloc aligns


def value_shapes(
    program: Program, inputs: Sequence[Sequence[int]], dtype: torch.dtype
) -> dict[str, tuple[int, ...] | None]:
    """The shape of every value for inputs of these shapes; None for values that are not tensors.

    Computed on the meta device.
    """
    eager = EagerExecutor()
    values: dict[str, Any] = {
        name: torch.empty(*shape, dtype=dtype, device="meta")
        for name, shape in zip(program.inputs, inputs, strict=True)
    }
    for step in program.steps:
        if isinstance(step, ConvStep):
            x = values[step.inputs[0]]
            values[step.output] = x.new_empty(step.spec.output_shape(x.shape))
        elif isinstance(step, BlockStep):
            x = values[step.inputs[0]]
            values[step.output] = x.new_empty(step.output_shape(x.shape))
        else:
            meta = step.map_tensors(lambda tensor: tensor.to("meta"))
            values[step.output] = eager.call(meta)(values)
    return {name: tuple(value.shape) if isinstance(value, Tensor) else None for name, value in values.items()}


@dataclass(frozen=True)
class Arena:
    """bytes: size of the one allocation; offset: of each value in it."""

    bytes: int
    offset: Mapping[str, int]


def arena_for(program: Program, shapes: Mapping[str, tuple[int, ...] | None], itemsize: int) -> Arena:
    """Places the inputs and the results of steps that take a buffer. Values live at once never overlap.

    A residual, or an operand of an elementwise step, is overwritten in place after its last use.
    """
    last_use = program.last_use
    owner = {name: name for name in program.inputs}  # value -> the value whose memory it reuses
    born = dict.fromkeys(program.inputs, -1)
    for position, step in enumerate(program.steps):
        shape = shapes[step.output]
        if not _takes_buffer(step) or shape is None or len(shape) != 4:
            continue
        born[step.output] = position
        for name in _may_be_overwritten(step):
            if name in born and shapes[name] == shape and last_use[name] == position:
                owner[step.output] = owner.get(name, name)
                break
        else:
            owner[step.output] = step.output

    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for name, buffer in owner.items():
        first[buffer] = min(first.get(buffer, born[name]), born[name])
        last[buffer] = max(last.get(buffer, -1), last_use[name])
    size = {buffer: round_up(math.prod(shapes[buffer] or ()) * itemsize, _ALIGNMENT) for buffer in first}

    offset_of: dict[str, int] = {}
    for buffer in sorted(first, key=lambda p: (-size[p], first[p])):
        occupied = sorted(
            (offset_of[other], offset_of[other] + size[other])
            for other in offset_of
            if first[other] <= last[buffer] and first[buffer] <= last[other]
        )
        offset = 0
        for start, end in occupied:
            if offset + size[buffer] <= start:
                break
            offset = max(offset, end)
        offset_of[buffer] = offset
    total = max((offset_of[buffer] + size[buffer] for buffer in offset_of), default=0)
    return Arena(total, {name: offset_of[buffer] for name, buffer in owner.items()})


def _takes_buffer(step: Step) -> bool:
    """Whether the step writes into a given buffer."""
    if isinstance(step, ElementwiseStep):
        return step.activation not in GATES
    return isinstance(step, (ConvStep, BlockStep, ConcatStep, SelectStep))


def _may_be_overwritten(step: Step) -> tuple[str, ...]:
    """Inputs of which the step reads every element before it writes the element at the same position."""
    if isinstance(step, ConvStep | BlockStep):
        x, *residual = step.inputs
        return tuple(name for name in residual if name != x)
    return step.inputs if isinstance(step, ElementwiseStep) else ()
