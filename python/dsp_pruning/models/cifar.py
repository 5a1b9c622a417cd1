"""ResNets for small images (He et al. 2016, section 4.2), with a 1x1 convolution in shortcuts (option B)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_pruning.checks import check, check_count, is_count

_MAX_DEPTH = 1202  # the deepest network in the paper


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut. forward() reads no width, so packing may change the widths."""

    def __init__(self, in_channels: int, planes: int, stride: int) -> None:
        super().__init__()
        self.conv_a = nn.Conv2d(in_channels, planes, 3, stride=stride, padding=1, bias=False)
        self.bn_a = nn.BatchNorm2d(planes)
        self.conv_b = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn_b = nn.BatchNorm2d(planes)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != planes:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, planes, 1, stride=stride, bias=False), nn.BatchNorm2d(planes)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        inner = F.relu(self.bn_a(self.conv_a(x)))
        return F.relu(shortcut + self.bn_b(self.conv_b(inner)))


class CifarResNet(nn.Module):
    """The class of ``cifar_resnet``'s models: images (batch, in_channels, height, width) -> logits.

    >>> isinstance(cifar_resnet(8), CifarResNet)
    True
    """

    def __init__(self, depth: int, num_classes: int, in_channels: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv_1_3x3 = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.bn_1 = nn.BatchNorm2d(16)
        self.stage_1 = _stage(16, 16, blocks, stride=1)
        self.stage_2 = _stage(16, 32, blocks, stride=2)
        self.stage_3 = _stage(32, 64, blocks, stride=2)
        self.classifier = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (batch, in_channels, height, width) -> logits (batch, num_classes)."""
        x = F.relu(self.bn_1(self.conv_1_3x3(x)))
        x = self.stage_3(self.stage_2(self.stage_1(x)))
        return self.classifier(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def cifar_resnet(
    depth: int, num_classes: int = 10, in_channels: int = 3, *, generator: torch.Generator | None = None
) -> CifarResNet:
    """ResNet for CIFAR: float32 images (batch, in_channels, height, width) -> logits (batch, num_classes).

    depth: 6n + 2, for example 20, 32, 44, 56 or 110; at most 1202.
    generator: of the initial weights, He-normal by fan-out; None is torch's global generator.
    Raises DSPPruningError for another depth, or num_classes or in_channels below 1.

    >>> model = cifar_resnet(20, num_classes=10)
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    valid = is_count(depth, least=8) and depth <= _MAX_DEPTH and (depth - 2) % 6 == 0
    examples = "20, 32, 44, 56 or 110"
    check(valid, "depth", depth, f"6n + 2 with n >= 1 and at most {_MAX_DEPTH}, for example {examples}")
    check_count("num_classes", num_classes)
    check_count("in_channels", in_channels)
    model = CifarResNet(depth, num_classes, in_channels)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            # Fan-out keeps the scale of the gradients from layer to layer (He et al. 2015).
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear", generator=generator)
            nn.init.zeros_(module.bias)
    return model


def _stage(in_channels: int, planes: int, blocks: int, stride: int) -> nn.Sequential:
    first = _Block(in_channels, planes, stride)
    return nn.Sequential(first, *(_Block(planes, planes, 1) for _ in range(blocks - 1)))
