"""Small networks that many tests share, most for images of 3 x 8 x 8."""

import copy
from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.run.cpu.extension import native
from dsp_kernels.run.programs import EXECUTORS

NAMES = ("residual", "pre-activation", "branching", "pools")
IMAGE = torch.zeros(1, 3, 8, 8)
# tests/run_cpu fails where the native one could be there and is not.
ON_A_CPU = [
    name
    for name in EXECUTORS.names()
    if name not in ("cuda", "triton", "cudnn") and (name != "cpu" or native() is not None)
]
# Channels 3 and 6 are absent.
MIXED = GroupStructure.build(6, 8, [([0, 5, 2], [1, 7, 4]), ([1], [0]), ([3, 4, 0, 1], [2, 5])])


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


class ToyA(nn.Module):
    """Of the golden files: conv0 3->8, conv1 8->12 (stride 2), conv2 12->10 (1x1), conv3 10->14 (stride 2),
    each with BN and ReLU.

    x: (batch, 3, height, width) -> logits: (batch, 10).
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 10, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(10)
        self.conv3 = nn.Conv2d(10, 14, 3, stride=2, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(14)
        self.fc = nn.Linear(14, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn0(self.conv0(x)))
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.relu(self.bn3(self.conv3(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Wild(nn.Module):
    """Constructs of torchvision's networks: flags that follow the mode, shuffles, gates, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            OrderedDict({"block-0": nn.Conv2d(3, 8, 3, padding=1), "norm": nn.GroupNorm(2, 8)})
        )
        structure = GroupStructure.build(8, 8, [([0, 5, 2], [1, 7, 4]), ([1], [0])])
        self.packed = PackedConv2d(structure, 3, padding=1)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.register_buffer("shift", torch.rand(8))
        self.gate = nn.Conv2d(8, 8, 1)
        self.unused = nn.Linear(3, 2)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.stem(x)
        batch, channels, height, width = x.shape
        shuffled = x.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(x.shape)
        left, right = shuffled.chunk(2, dim=1)
        y = self.packed(torch.cat((right, left), 1)) * self.scale + self.shift[None, :, None, None]
        y = y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True)))
        y = F.dropout(F.gelu(y), 0.5, self.training)
        y = F.interpolate(y, size=x.shape[-2:], mode="bilinear", align_corners=False)
        return {"logits": self.classifier(y[:, :, ::2].flatten(2).mean(-1)), "map": y}


class ConvThen(nn.Module):
    """A convolution of 3 channels, then any function of its output."""

    def __init__(self, function: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, channels, 3, padding=1), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.conv(x))


class Undecided(nn.Module):
    """Its control flow depends on the values of its input, so that nothing can trace it."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


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


def wild() -> nn.Module:
    torch.manual_seed(5)
    return settled(Wild())


def example(batch: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)
