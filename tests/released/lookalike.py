"""Networks of the shape of the authors' archives, to be traced: one gather, conv and norm per branch."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import nets
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Sampler(nn.Module):
    def __init__(self, index: Sequence[Tensor]) -> None:
        super().__init__()
        self.index = [i.view(1, -1, 1, 1) for i in index]  # plain attributes: constants of the trace

    def forward(self, x: Tensor) -> list[Tensor]:
        return [torch.take_along_dim(x, index, 1) for index in self.index]


class _Concat(nn.Module):
    def forward(self, branches: list[Tensor]) -> Tensor:
        return torch.cat(branches, 1)


class _Residual(nn.Module):
    def __init__(self, index: Sequence[Tensor]) -> None:
        super().__init__()
        self.index = list(index)

    def forward(self, x: Tensor, branches: list[Tensor]) -> Tensor:
        for index, branch in zip(self.index, branches, strict=True):
            x = x.index_add_(1, index, branch)
        return x


def _branches(sizes: Sequence[tuple[int, int]], kernel: int, stride: int, relu: bool) -> nn.ModuleList:
    return nn.ModuleList(
        nn.Sequential(
            nn.Conv2d(c, o, kernel, stride=stride, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(o),
            *([nn.ReLU(inplace=True)] if relu else []),
        )
        for c, o in sizes
    )


class Block(nn.Module):
    """indices[i][g]: channels that branch g of layer i reads; filters likewise; last: where the block writes.

    Two layers of 3x3 are a basic block, three of 1x1, 3x3, 1x1 a bottleneck; none is a block pruned away.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        indices: Sequence[Sequence[Tensor]],
        filters: Sequence[Sequence[int]],
        last: Sequence[Tensor],
    ) -> None:
        super().__init__()
        self.letters = "abc"[: len(indices)]
        kernels = (3, 3) if len(indices) < 3 else (1, 3, 1)
        strided = 0 if len(indices) < 3 else 1
        for number, letter in enumerate(self.letters):
            sizes = [(len(i), o) for i, o in zip(indices[number], filters[number], strict=True)]
            ends = number == len(indices) - 1
            step = stride if number == strided else 1
            self.add_module(f"layers_{letter}", _branches(sizes, kernels[number], step, not ends))
            self.add_module(f"sampler_{letter}", _Sampler(indices[number]))
            if not ends:
                self.add_module(f"concat_{letter}", _Concat())
        self.residual = _Residual(last)
        self.downsample = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            shortcut = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x
        branches: list[Tensor] = []
        for letter in self.letters:
            gathered = self.get_submodule(f"sampler_{letter}")(y)
            branches = [b(g) for b, g in zip(self.get_submodule(f"layers_{letter}"), gathered, strict=True)]
            if letter != self.letters[-1]:
                y = self.get_submodule(f"concat_{letter}")(branches)
        return F.relu(self.residual(self.downsample(x), branches))


class LookAlike(nn.Module):
    """Stem, stages of blocks, classifier; with a pooled stem as for large images where ``pooled``."""

    def __init__(
        self, stages: Sequence[Sequence[Block]], width: int, out: int, classes: int, pooled: bool
    ) -> None:
        super().__init__()
        stride = 2 if pooled else 1
        self.conv_1_3x3 = nn.Conv2d(3, width, 3, stride=stride, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(width)
        self.pooled = pooled
        self.n_stages = len(stages)
        for number, blocks in enumerate(stages, 1):
            self.add_module(f"stage_{number}", nn.Sequential(*blocks))
        self.classifier = nn.Linear(out, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn_1(self.conv_1_3x3(x)), inplace=True)
        if self.pooled:
            x = F.max_pool2d(x, 3, 2, 1)
        for number in range(1, self.n_stages + 1):
            x = self.get_submodule(f"stage_{number}")(x)
        x = F.adaptive_avg_pool2d(x, 1)
        return self.classifier(x.view(x.size(0), -1))


def random_network(
    branches: int,
    *,
    layers: int = 2,
    widths: Sequence[int] = (18, 22),
    blocks: int = 2,
    classes: int = 7,
    without: Sequence[tuple[int, int]] = (),
    pooled: bool = False,
) -> nn.Module:
    """Random branches, weights and statistics; blocks (stage, number) ``without`` are pruned away whole."""
    generator = torch.Generator().manual_seed(branches)

    def some(bound: int) -> Tensor:
        count = int(torch.randint(1, bound + 1, (), generator=generator))
        return torch.randperm(bound, generator=generator)[:count]

    stages, before = [], widths[0]
    for stage, width in enumerate(widths):
        made = []
        for number in range(blocks):
            stride = 2 if stage and not number else 1
            channels, indices, filters = before, [], []
            for layer in range(0 if (stage, number) in without else layers):
                indices.append([some(channels) for _ in range(branches)])
                filters.append([1 + (branch + layer) % 3 for branch in range(branches)])
                channels = sum(filters[-1])
            last: list[Tensor] = []
            if indices:  # the branches write different channels of the block
                places = torch.randperm(width, generator=generator)[: sum(filters[-1])]
                filters[-1] = [len(part) for part in places.tensor_split(branches)]
                last = list(places.tensor_split(branches))
            made.append(Block(before, width, stride, indices, filters, last))
            before = width
        stages.append(made)
    return nets.settled(LookAlike(stages, widths[0], widths[-1], classes, pooled), branches)


def save_traced(network: nn.Module, path: Path, size: int = 16) -> torch.jit.ScriptModule:
    """What the authors do: trace and save. The traced module itself is given back."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(network, torch.zeros(2, 3, size, size), check_trace=False)
    traced.save(str(path))
    return traced
