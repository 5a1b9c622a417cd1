"""BlockStep: a chain of convolutions with its residual as one step of a Program, and where a Program has one.

A block is two or three convolutions one after the other, the last of which adds a residual: the block's own
input, the result of a shortcut's convolution of it, or any other value. What its inner convolutions write is
read by nobody else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsp_kernels.program.steps import ConvStep, Program, Step, TensorMap

__all__ = ["MOST_CONVS", "BlockStep", "blocks_of", "residual_last", "with_blocks"]

# csrc/cuda/block_params.h: kMostConvs
MOST_CONVS = 3


@dataclass(frozen=True, eq=False)
class BlockStep(Step):
    """Inputs: (x,), or (x, residual) where the residual is neither x nor the shortcut's result.

    convs: in order; the last one's residual is added before its activation. shortcut: a convolution of x
    whose result is that residual, or None.
    """

    convs: tuple[ConvStep, ...]
    shortcut: ConvStep | None = None

    @property
    def members(self) -> tuple[ConvStep, ...]:
        """All its convolutions, the shortcut's first."""
        return (*((self.shortcut,) if self.shortcut else ()), *self.convs)

    @property
    def adds_input(self) -> bool:
        """Whether the residual is the block's own input."""
        return self.shortcut is None and len(self.inputs) == 1

    def output_shape(self, x: Sequence[int]) -> tuple[int, ...]:
        """x: (batch, channels, height, width) -> the output's. Raises DSPShapeError if x is too small."""
        size = tuple(x[2:])
        for conv in self.convs:
            size = conv.spec.output_hw(size)
        return (x[0], self.convs[-1].spec.structure.out_channels, *size)

    def map_tensors(self, function: TensorMap) -> BlockStep:
        shortcut = None if self.shortcut is None else self.shortcut.map_tensors(function)
        convs = tuple(conv.map_tensors(function) for conv in self.convs)
        return replace(self, convs=convs, shortcut=shortcut)

    def describe(self) -> str:
        kernels = ", ".join("x".join(map(str, conv.spec.kernel_size)) for conv in self.convs)
        return f"block of {kernels}" + (" with its shortcut" if self.shortcut else "")


def residual_last(program: Program) -> Program:
    """The same Program in which a shortcut's convolution comes first and its result is the residual.

    A sum has no order, and the planner gives the residual to the convolution that runs last, which in many
    networks is the shortcut's.
    """
    graph = _Graph(program)
    steps = list(program.steps)
    place = {step.output: position for position, step in enumerate(steps)}
    for position, step in enumerate(program.steps):
        if not isinstance(step, ConvStep) or len(step.inputs) != 2:
            continue
        x, name = step.inputs
        main = graph.inner_conv(name)
        if main is None or main.spec.activation != "none" or graph.reaches(step):
            continue
        chain = graph.chain(main, {x})
        if len(chain) < 2 or chain[0].inputs[0] != x:
            continue
        plain = step.spec.with_activation("none")
        steps[place[name]] = replace(step, output=name, inputs=(x,), spec=plain)
        steps[position] = replace(
            main,
            output=step.output,
            inputs=(main.inputs[0], name),
            spec=main.spec.with_activation(step.spec.activation),
        )
    return replace(program, steps=tuple(steps))


def blocks_of(program: Program) -> tuple[BlockStep, ...]:
    """Every residual block of a Program as ``residual_last`` gives it; none shares a step with another."""
    graph = _Graph(program)
    found = []
    for step in program.steps:
        if not isinstance(step, ConvStep) or len(step.inputs) != 2 or step.inputs[0] == step.inputs[1]:
            continue
        residual = step.inputs[1]
        convs = tuple(graph.chain(step, graph.sources(residual)))
        if len(convs) < 2:
            continue
        x = convs[0].inputs[0]
        shortcut = graph.inner_conv(residual)
        if shortcut is not None and shortcut.inputs == (x,) and shortcut.spec.activation == "none":
            block = BlockStep(step.output, (x,), convs, shortcut)
        else:
            block = BlockStep(step.output, (x,) if residual == x else (x, residual), convs)
        found.append(block)
        graph.taken |= {member.output for member in block.members}
    return tuple(found)


class _Graph:
    """Who makes a value and how often it is read; taken: values of blocks that were found already."""

    def __init__(self, program: Program) -> None:
        self.makers = {step.output: step for step in program.steps}
        self.readers = Counter(name for step in program.steps for name in step.inputs)
        self.readers[program.output] += 1
        self.taken: set[str] = set()

    def inner_conv(self, name: str) -> ConvStep | None:
        """The convolution without a residual that makes a value which is read once; else None."""
        maker = self.makers.get(name)
        if isinstance(maker, ConvStep) and len(maker.inputs) == 1 and self.readers[name] == 1:
            return None if name in self.taken else maker
        return None

    def sources(self, residual: str) -> set[str]:
        """Where a block may begin: at its residual, or at what the residual's convolution reads."""
        shortcut = self.inner_conv(residual)
        return {residual, *(shortcut.inputs if shortcut else ())}

    def chain(self, last: ConvStep, sources: set[str]) -> list[ConvStep]:
        """The convolutions up to ``last``, back to one of ``sources``, or as many as a block can have."""
        convs = [last]
        while len(convs) < MOST_CONVS and convs[0].inputs[0] not in sources:
            before = self.inner_conv(convs[0].inputs[0])
            if before is None:
                break
            convs.insert(0, before)
        return convs

    def reaches(self, last: ConvStep) -> bool:
        """Whether the chain up to ``last`` begins where its residual comes from."""
        sources = self.sources(last.inputs[1])
        convs = self.chain(last, sources)
        return len(convs) > 1 and convs[0].inputs[0] in sources


def with_blocks(program: Program, blocks: Sequence[BlockStep]) -> Program:
    """The Program with the steps of every block replaced by the block, where its last convolution stood."""
    last = {block.output: block for block in blocks}
    inner = {member.output for block in blocks for member in block.members} - set(last)
    steps: list[Any] = [last.get(step.output, step) for step in program.steps if step.output not in inner]
    return replace(program, steps=tuple(steps))
