"""Small networks with the constructs that the planner handles."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.run.cpu.extension import native
from dsp_kernels.run.programs import EXECUTORS

# tests/run_cpu fails where the native one could be there and is not.
ON_A_CPU = [
    name
    for name in EXECUTORS.names()
    if name not in ("cuda", "triton") and (name != "cpu" or native() is not None)
]
MIXED = GroupStructure.build(
    6, 8, [([0, 5, 2], [1, 7, 4]), ([1], [0]), ([3, 4, 0, 1], [2, 5])]
)  # 3, 6 absent


class Residual(nn.Module):
    """Stem, packed block with residual, strided block with a shortcut, pools, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.packed = PackedConv2d(MIXED, 3, padding=1, bias=True)
        self.packed_norm = nn.BatchNorm2d(8)
        self.back = nn.Conv2d(8, 6, 1, bias=False)
        self.back_norm = nn.BatchNorm2d(6)
        self.strided = PackedConv2d(MIXED, 3, stride=2, padding=1)
        self.strided_norm = nn.BatchNorm2d(8)
        self.shortcut = nn.Conv2d(6, 8, 1, stride=2)
        self.pool = nn.MaxPool2d(2)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(x + self.back_norm(self.back(F.relu(self.packed_norm(self.packed(x))))))
        x = F.relu(self.strided_norm(self.strided(x)) + self.shortcut(x))
        return self.classifier(self.pool(x).mean((2, 3)))


class PreActivation(nn.Module):
    """Norms before convolutions, an activation in place, a tensor with two readers, x + x."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.5)
        self.linear = nn.Linear(3 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.norm(x))
        z = self.relu(y)  # y is z from here on
        x = z + y + self.drop(z)
        x = F.avg_pool2d(x + x, 2)
        return F.silu(self.linear(x.view(x.size(0), -1)))


class Branching(nn.Module):
    """Concatenation, a product with a parameter, padding other than zeros, an elementwise chain."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        self.right = nn.Conv2d(3, 6, 1)
        self.depthwise = nn.Conv2d(10, 10, 3, groups=10, padding="same")
        self.gate = nn.Parameter(torch.rand(10, 1, 1))
        self.classifier = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), F.hardswish(self.right(x))], 1)
        x = F.relu6(self.depthwise(x)) * self.gate
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def plain_pools() -> nn.Module:
    """Every pooling setting; a norm after a pool; flatten."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.MaxPool2d(3, 2, 1, ceil_mode=True),
        nn.BatchNorm2d(4),
        nn.AvgPool2d(2, 1, 1, count_include_pad=False),
        nn.Hardswish(),
        nn.Flatten(),
        nn.LazyLinear(3),
    )


def settled(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model in eval mode with running statistics and norms that are not the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                for tensor, low, high in (
                    (module.running_mean, -0.3, 0.3),
                    (module.running_var, 0.5, 1.5),
                    (module.weight, 0.5, 1.5),
                    (module.bias, -0.5, 0.5),
                ):
                    tensor.uniform_(low, high, generator=generator)
    return model.eval()


def masked(model: nn.Module) -> nn.Module:
    """A copy of a network with the masks of its convolutions multiplied in."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and hasattr(module, "mask"):
                module.weight.mul_(module.mask)
    return model


def make(name: str) -> nn.Module:
    """One of the networks, by name, for inputs of 3x8x8."""
    torch.manual_seed(1)
    makers: dict[str, Callable[[], nn.Module]] = {
        "residual": Residual,
        "pre-activation": PreActivation,
        "branching": Branching,
        "pools": plain_pools,
    }
    model = makers[name]()
    model.eval()(torch.zeros(1, 3, 8, 8))  # lets lazy layers take their size
    return settled(model)


def example(batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Images for each of them."""
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


NAMES = ("residual", "pre-activation", "branching", "pools")
