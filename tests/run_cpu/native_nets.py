"""Networks with every kind of step that the native executor computes."""

import itertools
import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d

__all__ = ["MODELS", "Flat", "Mixed", "Net"]


def random_structure(rng: random.Random, c: int, o: int) -> GroupStructure:
    """Overlapping inputs, absent outputs, groups that read nothing, sometimes no group."""
    outputs = list(range(o))
    rng.shuffle(outputs)
    outputs = outputs[: rng.randint(0, o)]
    pairs = []
    while outputs:
        size = rng.randint(1, len(outputs))
        pairs.append((rng.sample(range(c), rng.randint(0, c)), outputs[:size]))
        outputs = outputs[size:]
    return GroupStructure.build(c, o, pairs)


def conv(rng: random.Random, c: int, o: int, kernel: int, stride: int, dilation: int = 1) -> PackedConv2d:
    made = PackedConv2d(
        random_structure(rng, c, o),
        kernel,
        stride,
        dilation * (kernel // 2),
        dilation,
        bias=rng.random() < 0.5,
    )
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return made


def norm(rng: random.Random, channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    generator = torch.Generator().manual_seed(rng.randrange(1 << 30))
    for tensor in (made.weight.data, made.bias.data, made.running_mean):
        assert tensor is not None
        tensor.copy_(torch.randn(channels, generator=generator))
    return made


class Block(nn.Module):
    def __init__(self, rng: random.Random, c: int, o: int, activation: type[nn.Module]) -> None:
        super().__init__()
        self.stride = rng.choice([1, 2])
        middle = rng.randint(1, 20)
        kernel = rng.choice([1, 3, 5])
        self.a = conv(rng, c, middle, kernel, self.stride, rng.choice([1, 2]))
        self.bn_a = norm(rng, middle)
        self.b = conv(rng, middle, o, rng.choice([1, 3]), 1)
        self.bn_b = norm(rng, o)
        self.down = nn.Conv2d(c, o, 1, self.stride) if self.stride > 1 or c != o else nn.Identity()
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn_b(self.b(self.act(self.bn_a(self.a(x))))) + self.down(x))


class Net(nn.Module):
    """A random residual network with every kind of step."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = random.Random(seed)
        activation = rng.choice([nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish])
        widths = [rng.randint(1, 40) for _ in range(4)]
        self.stem = (
            nn.Conv2d(3, widths[0], 7, 2, 3, bias=False) if seed % 2 else nn.Conv2d(3, widths[0], 3, 1, 1)
        )
        self.bn = norm(rng, widths[0])
        self.act = activation()
        pools = [
            nn.MaxPool2d(3, 2, 1),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.AvgPool2d(3, 2, 1, count_include_pad=False),
            nn.AvgPool2d(2, 1, divisor_override=3),
            nn.AvgPool2d(3, 2, 1),
            nn.MaxPool2d((1, 3), (1, 2), dilation=(1, 2)),
        ]
        self.pool = pools[seed % len(pools)]
        self.blocks = nn.Sequential(*(Block(rng, c, o, activation) for c, o in itertools.pairwise(widths)))
        self.last_norm = norm(rng, widths[-1])
        self.classifier = nn.Linear(widths[-1], 11)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(self.act(self.bn(self.stem(x)))))
        return self.classifier(F.adaptive_avg_pool2d(self.last_norm(x), 1).flatten(1))


class Flat(nn.Module):
    """A linear layer over whole feature maps, and a tensor that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.linear = nn.Linear(5 * 4 * 6, 70)
        self.out = nn.Linear(70, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        y = y + y
        return self.out(F.silu(self.linear(y.flatten(1))))


class Mixed(nn.Module):
    """Native segments around operations that only PyTorch computes."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        gate = torch.sin(y.mean((2, 3), keepdim=True))
        return F.relu(self.b(y * gate) + y)


class Dense(nn.Module):
    """Concatenations of concatenations, read by norms, windows, strides, pools and the output."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(5 + 3 * n) for n in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(5 + 3 * n, 3, 3, padding=1) for n in range(3))
        self.down = nn.Conv2d(14, 6, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.average = nn.AvgPool2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [F.relu(self.stem(x))]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            parts.append(conv(F.relu(norm(torch.cat(parts, 1)))))
        x = torch.cat(parts, 1)
        return torch.cat([self.down(x), self.pool(x), self.average(F.relu(x))], 1)


class Excite(nn.Module):
    """Squeeze-excite written in two ways, and a product that must not overwrite its operands."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 3, padding=1)
        self.squeeze = nn.Conv2d(9, 4, 1)
        self.excite = nn.Conv2d(4, 9, 1)
        self.after = nn.Conv2d(9, 7, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.conv(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        y = gate * x
        z = F.relu(y * x)
        other = F.hardsigmoid(x.mean((2, 3), keepdim=True))
        return self.after(F.hardswish(z * other) + y + torch.sigmoid(x))


class Shuffle(nn.Module):
    """Chunks, slices, two kinds of shuffles; an in-place add must not overwrite what a view still reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.branch = nn.Conv2d(6, 6, 3, padding=1)
        self.last = nn.Conv2d(12, 5, 1)
        self.shuffle = nn.ChannelShuffle(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        kept, changed = x.chunk(2, dim=1)
        x = torch.cat((kept, F.relu(self.branch(changed) + kept)), 1)
        n, c, h, w = x.shape
        x = x.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        x = x + torch.cat((x[:, 3:], x[:, :3]), 1)
        return self.last(F.relu(self.shuffle(x))) + x[:, 2:7]


class Pools(nn.Module):
    """An adaptive pool whose sizes may not divide, and a linear layer over its output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d((3, 4))
        self.linear = nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(F.relu(self.conv(x))).flatten(1))


class Resize(nn.Module):
    """Maps made larger, padded and cut; GELU in both forms; a convolution as a function; a difference."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.small = nn.Conv2d(2, 8, 3, stride=2, groups=2)
        self.last = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        y = F.pad(F.pixel_shuffle(x, 2), (0, 1, 0, 1))
        y = F.conv2d(y, self.small.weight, self.small.bias, self.small.stride, groups=2)
        y = F.gelu(x - y, approximate="tanh") - x
        y = F.max_pool2d(F.pad(F.interpolate(y, scale_factor=2), (1, -3, -1, 1), value=-float("inf")), 3, 2)
        return self.last(y)


class Fit(nn.Module):
    """Transposed convolutions, norms by image, maps brought to the size of others, features as a map."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(2, 8), nn.ReLU())
        self.up = nn.Sequential(
            nn.ConvTranspose2d(8, 4, (3, 4), 2, 1, (1, 0), 2), nn.BatchNorm2d(4), nn.SiLU()
        )
        self.odd = nn.ConvTranspose2d(4, 4, (2, 3), 3, (0, 1), (1, 2), bias=False, dilation=(1, 2))
        self.instance, self.group = nn.InstanceNorm2d(4), nn.GroupNorm(1, 4, 1e-3)
        self.linear, self.tracked = (
            nn.Linear(4, 36),
            nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.stem(x))
        down, right = x.size(2) - y.shape[2], x.size()[3] - y.size(-1)
        around = F.pad(y, [right // 2, right - right // 2, down // 2, down - down // 2])
        y = around + F.pad(y, (0, x.shape[-1] - y.shape[3], 0, down))
        z = self.group(F.interpolate(self.odd(y), size=x.shape[-2:])) * F.hardswish(self.instance(y))
        up = self.tracked(self.linear(z.mean((2, 3))).view(-1, 4, 3, 3))
        for corners in (False, True):
            grown = F.interpolate(up, (11, 5), mode="bilinear", align_corners=corners)
            up = F.interpolate(grown, scale_factor=2, mode="bilinear", align_corners=corners)
        return torch.tanh(z + F.interpolate(up, (x.shape[2], x.shape[3]), mode="bilinear"))


MODELS = {
    **{"dense": Dense, "excite": Excite, "shuffle": Shuffle},
    **{"pools": Pools, "resize": Resize, "fit": Fit},
}
