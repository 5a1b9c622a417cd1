"""Whole networks of families that users prune, small: a detector, U-Nets, super-resolution, an FPN, a GAN."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from stages import Outcome
from torch import Tensor, nn


def conv(c: int, o: int, k: int = 3, s: int = 1, act: type[nn.Module] = nn.SiLU) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o), act())


class C2f(nn.Module):
    """Two halves, one of which passes through residual blocks; everything is concatenated."""

    def __init__(self, c: int, o: int, n: int = 1, add: bool = True) -> None:
        super().__init__()
        self.add, half = add, o // 2
        self.first, self.last = conv(c, o, 1), conv((2 + n) * half, o, 1)
        self.blocks = nn.ModuleList(nn.Sequential(conv(half, half), conv(half, half)) for _ in range(n))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            y.append(y[-1] + block(y[-1]) if self.add else block(y[-1]))
        return self.last(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.first, self.last, self.pool = conv(c, c // 2, 1), conv(2 * c, c, 1), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = [self.first(x)]
        y.extend(self.pool(y[-1]) for _ in range(3))
        return self.last(torch.cat(y, 1))


class Detect(nn.Module):
    """Decoupled heads; a box side is the expectation over 8 bins, by a frozen 1x1 convolution (DFL)."""

    bins = 8

    def __init__(self, widths: tuple[int, ...], classes: int) -> None:
        super().__init__()
        head = lambda c, o: nn.Sequential(conv(c, 16), conv(16, 16), nn.Conv2d(16, o, 1))  # noqa: E731
        self.box = nn.ModuleList(head(c, 4 * self.bins) for c in widths)
        self.kind = nn.ModuleList(head(c, classes) for c in widths)
        self.dfl = nn.Conv2d(self.bins, 1, 1, bias=False).requires_grad_(False)
        self.dfl.weight.data[:] = torch.arange(float(self.bins)).view(1, -1, 1, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        found = []
        for level, x in enumerate(maps):
            box, kind = self.box[level](x).flatten(2), self.kind[level](x).flatten(2)
            box = box.view(box.shape[0], 4, self.bins, -1).transpose(1, 2).softmax(1)
            found.append(torch.cat([self.dfl(box).squeeze(1) * 2.0 ** (3 + level), kind.sigmoid()], 1))
        return torch.cat(found, 2)


class Yolo(nn.Module):
    """YOLOv8's backbone, neck and head: (batch, 3, h, w) -> (batch, 4 + classes, boxes)."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 3, 2), conv(8, 16, 3, 2), C2f(16, 16))
        self.p3 = nn.Sequential(conv(16, 24, 3, 2), C2f(24, 24, 2))
        self.p4 = nn.Sequential(conv(24, 32, 3, 2), C2f(32, 32, 2))
        self.p5 = nn.Sequential(conv(32, 48, 3, 2), C2f(48, 48), SPPF(48))
        self.up, self.up4, self.up3 = (
            nn.Upsample(scale_factor=2),
            C2f(80, 32, 1, False),
            C2f(56, 24, 1, False),
        )
        self.down3, self.down4 = conv(24, 24, 3, 2), conv(32, 32, 3, 2)
        self.out4, self.out5 = C2f(56, 32, 1, False), C2f(80, 48, 1, False)
        self.detect = Detect((24, 32, 48), classes)

    def forward(self, x: Tensor) -> Tensor:
        p3 = self.p3(self.stem(x))
        p4 = self.p4(p3)
        p5 = self.p5(p4)
        n4 = self.up4(torch.cat([self.up(p5), p4], 1))
        n3 = self.up3(torch.cat([self.up(n4), p3], 1))
        n4 = self.out4(torch.cat([self.down3(n3), n4], 1))
        return self.detect([n3, n4, self.out5(torch.cat([self.down4(n4), p5], 1))])


class UNet(nn.Module):
    """Of any image size; ``transposed``: how it scales up, otherwise bilinearly."""

    def __init__(self, norm: Callable[[int], nn.Module], transposed: bool) -> None:
        super().__init__()

        def double(c: int, o: int) -> nn.Sequential:
            first = nn.Conv2d(c, o, 3, padding=1, bias=False), norm(o), nn.ReLU(inplace=True)
            return nn.Sequential(*first, nn.Conv2d(o, o, 3, padding=1, bias=False), norm(o), nn.ReLU())

        widths = (8, 16, 32)
        self.down = nn.ModuleList(double(c, o) for c, o in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(c, o, 2, 2) if transposed else nn.Conv2d(c, o, 1)
            for c, o in ((32, 16), (16, 8))
        )
        self.joined = nn.ModuleList(double(2 * o, o) for o in (16, 8))
        self.transposed, self.head = transposed, nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for up, joined, skip in zip(self.up, self.joined, skips[-2::-1], strict=True):
            x = up(x)
            if self.transposed:
                x = F.pad(x, (0, skip.shape[3] - x.shape[3], 0, skip.shape[2] - x.shape[2]))
            else:
                x = F.interpolate(x, size=skip.shape[2:], mode="bilinear", align_corners=False)
            x = joined(torch.cat([skip, x], 1))
        return self.head(x)


class Block(nn.Module):
    """RCAN's residual block with channel attention; EDSR's without."""

    def __init__(self, c: int, attention: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1))
        gate = nn.AdaptiveAvgPool2d(1), nn.Conv2d(c, 4, 1), nn.ReLU(), nn.Conv2d(4, c, 1), nn.Sigmoid()
        self.gate = nn.Sequential(*gate) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return x + 0.1 * (y if self.gate is None else y * self.gate(y))


class SuperResolution(nn.Module):
    def __init__(self, attention: bool, c: int = 16) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, c, 3, padding=1)
        self.body = nn.Sequential(*(Block(c, attention) for _ in range(3)), nn.Conv2d(c, c, 3, padding=1))
        self.tail = nn.Sequential(
            *(nn.Conv2d(c, 4 * c, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(c, 3, 3, padding=1))
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        return self.tail(x + self.body(x))


class FPN(nn.Module):
    """A ResNet with torchvision's FrozenBatchNorm2d and a feature pyramid: three maps."""

    def __init__(self) -> None:
        super().__init__()
        from torchvision.ops import FrozenBatchNorm2d

        class Basic(nn.Module):
            def __init__(self, c: int, o: int, stride: int) -> None:
                super().__init__()
                self.a, self.b = (
                    nn.Conv2d(c, o, 3, stride, 1, bias=False),
                    nn.Conv2d(o, o, 3, 1, 1, bias=False),
                )
                self.norm_a, self.norm_b = FrozenBatchNorm2d(o), FrozenBatchNorm2d(o)
                same = stride == 1 and c == o
                short = nn.Conv2d(c, o, 1, stride, bias=False), FrozenBatchNorm2d(o)
                self.downsample = nn.Identity() if same else nn.Sequential(*short)

            def forward(self, x: Tensor) -> Tensor:
                y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
                return F.relu(y + self.downsample(x))

        self.stem = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3, bias=False), FrozenBatchNorm2d(16), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(Basic(c, o, 2), Basic(o, o, 1)) for c, o in ((16, 16), (16, 24), (24, 32))
        )
        self.inner = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in (16, 24, 32))
        self.layer = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        last = self.inner[2](maps[2])
        found = [self.layer[2](last)]
        for level in (1, 0):
            lateral = self.inner[level](maps[level])
            last = lateral + F.interpolate(last, size=lateral.shape[2:], mode="nearest")
            found.insert(0, self.layer[level](last))
        return tuple(found)


class Generator(nn.Module):
    """Noise (batch, 3, 8, 8) -> linear -> view -> transposed convolutions -> an image of 16 x 16."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(192, 24 * 4 * 4)
        up = lambda c, o: (nn.ConvTranspose2d(c, o, 4, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU())  # noqa: E731
        refine = nn.Conv2d(16, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()
        self.body = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), *up(24, 16), *refine, *up(12, 8)
        )
        self.image = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.project(z.flatten(1)).view(-1, 24, 4, 4)
        return torch.tanh(self.image(self.body(x)))


# Name -> a function that makes the network, height and width of its images, and how many steps of fuse()
# before the head are plain PyTorch.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "YOLOv8": (Yolo, 64, 27),
    "U-Net, bilinear, group norm, odd": (lambda: UNet(lambda c: nn.GroupNorm(4, c), False), 37, 0),
    "U-Net, transposed, instance norm, odd": (
        lambda: UNet(lambda c: nn.InstanceNorm2d(c, affine=True), True),
        *(37, 0),
    ),
    "EDSR": (lambda: SuperResolution(False), 24, 0),
    "RCAN": (lambda: SuperResolution(True), 24, 0),
    "FPN": (FPN, 64, 0),
    "GAN": (Generator, 8, 0),
}


def check(made: Outcome, plain: int) -> None:
    """Nothing failed, all answers agree, and at most so many steps before the head are plain PyTorch."""
    assert not made.failed
    assert made.errors.pop("packed") <= 1e-10
    assert made.errors.pop("saved") == 0
    assert max(made.errors.values()) <= 1e-4
    assert made.plain <= plain
