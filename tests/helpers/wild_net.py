"""A network of torchvision's constructs, and images for it."""

from __future__ import annotations

from collections import OrderedDict

import nets
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d

IMAGE = torch.zeros(1, 3, 8, 8)


def images() -> Tensor:
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


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


def wild() -> nn.Module:
    torch.manual_seed(5)
    return nets.settled(Wild())
