"""BlockStep: a residual block as one step of a Program, and how the blocks of a Program are found.

A block is a chain of two or three convolutions, the last of which adds a residual: the block's input, the
output of a shortcut convolution of that input, or any other value. The outputs of its inner convolutions
have no other reader.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dsp_kernels.program.steps import ConvStep, Program, Step

# csrc/cuda/params.h: kMostConvs
MOST_CONVS = 3


@dataclass(frozen=True, eq=False)
class BlockStep(Step):
    """inputs: (x,), or (x, residual) where the residual is neither x nor the output of the shortcut.

    convs: in order; the residual is added before the activation of the last one. shortcut: the convolution of
    x that makes the residual, or None.
    """

    convs: tuple[ConvStep, ...]
    shortcut: ConvStep | None = None

    @property
    def members(self) -> tuple[ConvStep, ...]:
        """All convolutions, the shortcut first."""
        return (*((self.shortcut,) if self.shortcut else ()), *self.convs)

    @property
    def adds_input(self) -> bool:
        """Whether the residual is the block's input."""
        return self.shortcut is None and len(self.inputs) == 1

    def output_shape(self, x: Sequence[int]) -> tuple[int, ...]:
        """For x: (batch, channels, height, width). Raises DSPShapeError if x is too small."""
        shape = tuple(x)
        for conv in self.convs:
            shape = conv.spec.output_shape(shape)
        return shape

    def describe(self) -> str:
        kernels = ", ".join("x".join(map(str, conv.spec.kernel_size)) for conv in self.convs)
        return f"block of {kernels}" + (" with its shortcut" if self.shortcut else "")


def residual_last(program: Program) -> Program:
    """The same Program with every shortcut convolution before the block, its output being the residual.

    The planner adds the residual to the convolution that runs last, which in many networks is the shortcut.
    """
    graph = _Graph(program)
    steps = list(program.steps)
    index = {step.output: position for position, step in enumerate(steps)}
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
        steps[index[name]] = replace(step, output=name, inputs=(x,), spec=plain)
        steps[position] = replace(
            main,
            output=step.output,
            inputs=(main.inputs[0], name),
            spec=main.spec.with_activation(step.spec.activation),
        )
    return replace(program, steps=tuple(steps))


def blocks_of(program: Program) -> tuple[BlockStep, ...]:
    """Every residual block of a Program in the form of ``residual_last``; blocks share no step."""
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
    """The maker and the number of readers of each value. taken: values of blocks found so far."""

    def __init__(self, program: Program) -> None:
        self.makers = {step.output: step for step in program.steps}
        self.readers = Counter(name for step in program.steps for name in step.inputs)
        self.readers[program.output] += 1
        self.taken: set[str] = set()

    def inner_conv(self, name: str) -> ConvStep | None:
        """The convolution without residual that makes this value, if it is read once; else None."""
        maker = self.makers.get(name)
        if isinstance(maker, ConvStep) and len(maker.inputs) == 1 and self.readers[name] == 1:
            return None if name in self.taken else maker
        return None

    def sources(self, residual: str) -> set[str]:
        """Values at which a block may begin: its residual, or the input of the shortcut that makes it."""
        shortcut = self.inner_conv(residual)
        return {residual, *(shortcut.inputs if shortcut else ())}

    def chain(self, last: ConvStep, sources: set[str]) -> list[ConvStep]:
        """The convolutions up to ``last``, from one of ``sources`` on, at most MOST_CONVS."""
        convs = [last]
        while len(convs) < MOST_CONVS and convs[0].inputs[0] not in sources:
            before = self.inner_conv(convs[0].inputs[0])
            if before is None:
                break
            convs.insert(0, before)
        return convs

    def reaches(self, last: ConvStep) -> bool:
        """Whether the chain up to ``last`` begins at one of its sources."""
        sources = self.sources(last.inputs[1])
        convs = self.chain(last, sources)
        return len(convs) > 1 and convs[0].inputs[0] in sources


def with_blocks(program: Program, blocks: Sequence[BlockStep]) -> Program:
    """The Program with every block in place of its last convolution, and without its other steps."""
    last = {block.output: block for block in blocks}
    inner = {member.output for block in blocks for member in block.members} - set(last)
    steps: list[Any] = [last.get(step.output, step) for step in program.steps if step.output not in inner]
    return replace(program, steps=tuple(steps))
