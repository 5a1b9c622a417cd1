"""The table of residual blocks that every implementation has to pass, and the reference result."""

from dataclasses import dataclass

import torch
from cases import ONE_TO_ONE, Case, definition
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.program.steps import ConvStep
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep

Conv = tuple[GroupStructure, int, int]  # structure, kernel, stride


@dataclass(frozen=True)
class BlockCase:
    """A block, its input and its tiles. shortcut: a convolution, or "input" or "tensor" for the residual."""

    name: str
    convs: tuple[Conv, ...]
    shortcut: Conv | str = "input"
    batch: int = 8
    hw: tuple[int, int] = (6, 5)
    tile: tuple[int, int, int] = (4, 4, 1)  # rows, columns, multiples of 8 images
    turns: int = 1
    activation: str = "relu"
    inner: str = "relu"
    bias: bool = True

    def step(self, dtype: torch.dtype) -> BlockStep:
        generator = torch.Generator().manual_seed(len(self.name))

        def conv(settings: Conv, output: str, inputs: tuple[str, ...], activation: str) -> ConvStep:
            structure, kernel, stride = settings
            spec = ConvSpec(
                structure, (kernel, kernel), (stride, stride), (kernel // 2, kernel // 2), (1, 1), activation
            )
            weights = []
            for group in structure.groups:
                shape = len(group.out_index), len(group.in_index), kernel, kernel
                fan = max(1, len(group.in_index) * kernel * kernel)
                weights.append((torch.randn(shape, generator=generator) / fan**0.5).to(dtype))
            bias = torch.randn(structure.out_channels, generator=generator).to(dtype) if self.bias else None
            return ConvStep(output, inputs, spec, tuple(weights), bias)

        names = ["x", *(f"inner{i}" for i in range(1, len(self.convs))), "y"]
        convs = []
        for number, settings in enumerate(self.convs):
            is_last = number + 1 == len(self.convs)
            inputs = (names[number], *(("r",) if is_last else ()))
            convs.append(
                conv(settings, names[number + 1], inputs, self.activation if is_last else self.inner)
            )
        if isinstance(self.shortcut, str):
            return BlockStep("y", ("x",) if self.shortcut == "input" else ("x", "r"), tuple(convs))
        return BlockStep("y", ("x",), tuple(convs), conv(self.shortcut, "r", ("x",), "none"))

    def input(self, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        shape = (self.batch, self.convs[0][0].in_channels, *self.hw)
        return torch.randn(shape, generator=generator).to(dtype)

    @property
    def reduction(self) -> int:
        """The number of products in the longest sum."""
        convs = [*self.convs, *([] if isinstance(self.shortcut, str) else [self.shortcut])]
        return max(Case("", conv[0], conv[1]).reduction for conv in convs)


def reference(step: BlockStep, x: Tensor, residual: Tensor | None) -> Tensor:
    """The result by the definition in float64, without rounding between convolutions."""

    def run(conv: ConvStep, value: Tensor, added: Tensor | None) -> Tensor:
        return definition(conv.spec, value, conv.weights, conv.bias, added)

    value, added = x, residual
    if step.shortcut:
        added = run(step.shortcut, value, None)
    elif step.adds_input:
        added = value
    for number, conv in enumerate(step.convs):
        value = run(conv, value, added if number + 1 == len(step.convs) else None)
    return value


NARROW = GroupStructure.build(7, 9, [([0, 3, 6], [1, 8]), ([2], [0, 4, 5]), ([5, 1, 2, 0], [7, 3])])
BACK = GroupStructure.build(9, 7, [([0, 4, 8, 2], [6, 0]), ([1, 3], [2, 3, 5]), ([7], [1])])  # 4 is absent
WIDE = GroupStructure.build(
    40, 36, [(range(0, 40, 2), range(0, 20)), (range(1, 30, 3), range(20, 33)), ([39], [34])]
)
WIDE_BACK = GroupStructure.build(
    36, 40, [(range(3, 36), range(1, 40, 2)), (range(0, 34, 5), range(0, 40, 2))]
)
SQUARE = GroupStructure.build(16, 16, [(range(0, 16, 2), range(8)), (range(1, 12), range(8, 14))])
POINTWISE = (GroupStructure.dense(12, 5), 1, 1)
SPATIAL = (GroupStructure.build(5, 6, [([0, 4], [1, 2]), ([1, 2, 3], [5, 0, 3])]), 3, 1)
EXPAND = (GroupStructure.build(6, 12, [(range(6), range(0, 12, 2)), ([1, 5], range(1, 10, 2))]), 1, 1)

BASIC = ((NARROW, 3, 1), (BACK, 3, 1))
SQUARES = ((SQUARE, 3, 1), (SQUARE, 3, 1))
WIDER = ((WIDE, 3, 1), (WIDE_BACK, 3, 1))
STRIDED = ((NARROW, 3, 2), (GroupStructure.dense(9, 8), 3, 1))
LARGE = ((GroupStructure.dense(20, 64), 3, 1), (GroupStructure.dense(64, 20), 3, 1))
BOTTLENECK = (POINTWISE, SPATIAL, EXPAND)
CONSTANT = (
    (GroupStructure.build(4, 4, [([], [0, 1, 2])]), 3, 1),
    (GroupStructure.build(4, 4, [([2, 3], [1])]), 3, 1),
)
DEPTHWISE = (POINTWISE, (GroupStructure.uniform(5, 5, 5), 3, 1), (GroupStructure.dense(5, 12), 1, 1))
GROUPED_SHORTCUT = (GroupStructure.build(7, 8, [([0, 5], [1, 2, 7]), ([6], [0])]), 1, 2)

STRIDED_BACK = ((NARROW, 3, 2), (BACK, 3, 1))
STRIDED_BOTTLENECK = (POINTWISE, (SPATIAL[0], 3, 2), EXPAND)
DENSE_SHORTCUT = (GroupStructure.dense(7, 8), 1, 2)
WIDE_SHORTCUT = (GroupStructure.uniform(40, 40, 4), 1, 1)
LONG_SHORTCUT = (GroupStructure.dense(12, 12), 1, 2)

CASES = (
    BlockCase("unequal groups, absent channels", BASIC),
    BlockCase("strips that divide nothing", BASIC, hw=(9, 7), tile=(4, 3, 1), batch=24),
    BlockCase("turns down the image", BASIC, hw=(11, 6), tile=(2, 6, 1), turns=3),
    BlockCase("turns of one row", SQUARES, hw=(5, 5), tile=(1, 5, 2), turns=5, batch=16),
    BlockCase("one channel, one pixel", ((ONE_TO_ONE, 3, 1), (ONE_TO_ONE, 3, 1)), hw=(1, 1)),
    BlockCase("no bias, other activations", BASIC, bias=False, activation="silu", inner="hardswish"),
    BlockCase("no activation at the end", SQUARES, activation="none", inner="relu6"),
    BlockCase("another residual", BASIC, "tensor", batch=16, tile=(3, 5, 1)),
    BlockCase("stride 2 with a shortcut", STRIDED, DENSE_SHORTCUT, hw=(9, 8), tile=(3, 2, 1)),
    BlockCase("stride 2, grouped shortcut", STRIDED, GROUPED_SHORTCUT, hw=(7, 7), tile=(1, 4, 1), turns=4),
    BlockCase("stride 2, another residual", STRIDED_BACK, "tensor", hw=(7, 9), tile=(2, 3, 1), turns=2),
    BlockCase("shortcut without stride", WIDER, WIDE_SHORTCUT, 16, hw=(4, 4), tile=(2, 4, 2), turns=2),
    BlockCase("more filters than a tile", WIDER, hw=(4, 5), tile=(4, 5, 1)),
    BlockCase("two tiles of 32", LARGE, hw=(3, 3), tile=(3, 3, 1)),
    BlockCase("bottleneck", BOTTLENECK, tile=(3, 5, 1)),
    BlockCase("bottleneck in turns", BOTTLENECK, hw=(7, 4), tile=(2, 2, 1), turns=4, batch=16),
    BlockCase("strided bottleneck", STRIDED_BOTTLENECK, LONG_SHORTCUT, hw=(7, 6), tile=(2, 3, 1), turns=2),
    BlockCase("bottleneck, another residual", BOTTLENECK, "tensor", tile=(6, 5, 1)),
    BlockCase("depthwise inside", DEPTHWISE),
    BlockCase("a convolution that reads nothing", CONSTANT),
    BlockCase("5x5 and 1x1", ((NARROW, 5, 1), (BACK, 1, 1)), tile=(2, 5, 1), turns=3),
)
IDS = [case.name.replace(" ", "-") for case in CASES]
