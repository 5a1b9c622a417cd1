"""The one table of cases of the op, for every backend."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from dsp_kernels import GroupStructure
from dsp_kernels.op.activations import ACTIVATIONS
from dsp_kernels.op.reference import gather_grouped_conv2d_reference
from dsp_kernels.op.spec import ConvSpec


@dataclass(frozen=True)
class Arguments:
    x: Tensor
    weights: list[Tensor]
    bias: Tensor | None
    residual: Tensor | None


@dataclass(frozen=True)
class Case:
    name: str
    structure: GroupStructure
    kernel: int | tuple[int, int] = 3
    batch: int = 2
    hw: tuple[int, int] = (7, 6)
    stride: int | tuple[int, int] = 1
    padding: int | tuple[int, int] = 1
    dilation: int | tuple[int, int] = 1
    bias: bool = True
    residual: bool = False
    activation: str = "none"
    channels_last: bool = False
    sliced: bool = False  # x is a view into a larger tensor
    seed: int = 0

    @property
    def spec(self) -> ConvSpec:
        sizes: Any = self.kernel, self.stride, self.padding, self.dilation
        return ConvSpec(self.structure, *sizes, self.activation)

    @property
    def settings(self) -> dict[str, Any]:
        return settings_of(self.spec)

    @property
    def reduction(self) -> int:
        """Terms of the sum in one output."""
        longest = max((len(group.in_index) for group in self.structure.groups), default=0)
        return longest * self.spec.kernel_size[0] * self.spec.kernel_size[1] + 2

    def tensors(self, dtype: torch.dtype = torch.float32) -> Arguments:
        generator = torch.Generator().manual_seed(self.seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(dtype)

        spec = self.spec
        x = draw(
            self.batch + self.sliced, self.structure.in_channels, *(size + self.sliced for size in self.hw)
        )
        if self.sliced:
            x = x[1:, :, 1:, 1:]
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        weights = [draw(len(g.out_index), len(g.in_index), *spec.kernel_size) for g in self.structure.groups]
        bias = draw(self.structure.out_channels) if self.bias else None
        shape = (self.batch, self.structure.out_channels, *spec.output_hw(self.hw))
        return Arguments(x, weights, bias, draw(*shape) if self.residual else None)


def settings_of(spec: ConvSpec) -> dict[str, Any]:
    """The op's keyword arguments."""
    names = ("kernel_size", "stride", "padding", "dilation", "activation")
    return {name: getattr(spec, name) for name in names}


def reference(case: Case, arguments: Arguments) -> Tensor:
    return definition(case.spec, *(getattr(arguments, field.name) for field in fields(Arguments)))


def definition(
    spec: ConvSpec, x: Tensor, weights: Sequence[Tensor], bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """The op's result by its definition, in float64."""
    bias, residual = (None if t is None else t.double() for t in (bias, residual))
    weights = [weight.double() for weight in weights]
    settings = settings_of(spec)
    return gather_grouped_conv2d_reference(x.double(), weights, spec.structure, bias, residual, **settings)


UNEQUAL = GroupStructure.build(7, 9, [([0, 3, 6], [1, 8]), ([2], [0, 4, 5]), ([5, 1, 2, 0], [7, 3])])
ONE_TO_ONE = GroupStructure.build(1, 1, [([0], [0])])
WIDE = GroupStructure.build(
    24, 20, [(range(0, 24, 2), range(0, 8)), (range(1, 20, 3), range(8, 13)), ([23], [19, 13])]
)

CASES = (
    Case("unequal groups, one absent channel", UNEQUAL),
    Case("no bias", UNEQUAL, bias=False),
    Case("residual and relu", UNEQUAL, residual=True, activation="relu"),
    Case("residual without bias", UNEQUAL, bias=False, residual=True, activation="relu6"),
    *(Case(f"activation {name}", UNEQUAL, residual=True, activation=name, seed=3) for name in ACTIVATIONS),
    Case(
        "a group that reads nothing", GroupStructure.build(3, 4, [([0, 2], [3]), ([], [1, 0])]), residual=True
    ),
    Case("no group reads anything", GroupStructure.build(3, 4, [([], [1, 0])]), activation="relu"),
    Case("no groups", GroupStructure(4, 5), bias=False),
    Case("no groups, residual", GroupStructure(4, 5), residual=True, activation="silu"),
    Case("one channel, one filter", ONE_TO_ONE),
    Case("one channel, one pixel", ONE_TO_ONE, hw=(1, 1)),  # every layout is contiguous at once
    Case("dense", GroupStructure.dense(5, 6)),
    Case("depthwise", GroupStructure.uniform(6, 6, 6), activation="hardswish"),
    Case("equal neighbouring groups", GroupStructure.uniform(8, 12, 4)),
    Case("equal groups, shuffled", GroupStructure.build(4, 4, [([3, 1], [2, 0]), ([0, 2], [1, 3])])),
    Case("overlapping inputs", GroupStructure.build(4, 6, [([0, 1, 2], [0, 1]), ([1, 2, 3], [5, 4])])),
    Case("wide", WIDE, hw=(9, 17)),
    Case("1x1", WIDE, kernel=1, padding=0),
    Case("1x1 with stride", WIDE, kernel=1, padding=0, stride=2),
    Case("1x1 with padding", UNEQUAL, kernel=1, padding=1),
    Case("stride 2, odd size", UNEQUAL, stride=2, hw=(9, 5)),
    Case("stride 2, even size", UNEQUAL, stride=2, hw=(8, 8)),
    Case("stride 3", UNEQUAL, stride=3, hw=(10, 11)),
    Case("7x7 stem", GroupStructure.dense(3, 10), kernel=7, stride=2, padding=3, hw=(15, 13)),
    Case("5x5 without padding", UNEQUAL, kernel=5, padding=0, hw=(9, 8)),
    Case("even kernel", UNEQUAL, kernel=2, padding=0),
    Case("dilation", UNEQUAL, dilation=2, padding=2, hw=(9, 9)),
    Case("rectangular", UNEQUAL, kernel=(1, 3), padding=(0, 1), stride=(2, 1), dilation=(1, 2), hw=(6, 9)),
    Case("more padding than kernel", UNEQUAL, padding=3, hw=(4, 4)),
    Case("output of one pixel", UNEQUAL, padding=0, hw=(3, 3)),
    Case("one row", UNEQUAL, hw=(1, 19)),
    Case("batch 0", UNEQUAL, batch=0, residual=True),
    Case("batch 1", UNEQUAL, batch=1),
    Case("batch 17", UNEQUAL, batch=17, hw=(8, 8)),
    Case("channels_last", UNEQUAL, channels_last=True, residual=True),
    Case("channels_last, stride 2", WIDE, channels_last=True, stride=2, hw=(8, 8)),
    Case("a view into a larger tensor", UNEQUAL, sliced=True),
)
IDS = [case.name.replace(" ", "-") for case in CASES]
