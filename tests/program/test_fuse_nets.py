"""fuse on networks with one thing in them that is easy to get wrong."""

from __future__ import annotations

from collections.abc import Callable

import nets
import pytest
import torch
from torch import Tensor, nn

import dsp_kernels


def test_a_single_packed_conv_can_be_fused() -> None:
    conv = dsp_kernels.PackedConv2d(nets.MIXED, 3, padding=1).eval()
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(dsp_kernels.fuse(conv, x)(x), conv(x), rtol=1e-4, atol=1e-5)


class _WritesAfterReading(nn.Module):
    """A convolution reads a tensor that is changed in place before the result is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        read = self.second(hidden)
        hidden.mul_(2)
        return self.norm(read) + hidden


def test_a_convolution_is_not_moved_behind_a_write() -> None:
    model = nets.settled(_WritesAfterReading())
    for name in nets.ON_A_CPU:
        fused = dsp_kernels.fuse(model, nets.example(), backend=name)
        torch.testing.assert_close(
            fused(nets.example(seed=2)), model(nets.example(seed=2)), rtol=1e-4, atol=1e-5
        )


def test_plain_modules_are_kept_in_eval_mode() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.RReLU(0.1, 0.9), nn.Dropout3d(0.9)).train()
    fused = dsp_kernels.fuse(model, nets.example())
    model.eval()
    torch.testing.assert_close(fused(nets.example()), model(nets.example()), rtol=1e-4, atol=1e-5)


class _Offset(nn.Module):
    """A parameter that has, for one image, the shape of what it is added to; pools of unchanged size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 8)
        self.offset = nn.Parameter(torch.randn(1, 4, 1, 1))
        self.pool = nn.AdaptiveAvgPool2d((None, None))

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x) + self.offset)


class _Aliased(nn.Module):
    """An operation in place on another name of a tensor, and one on the input."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.relu, self.conv = nn.Identity(), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x.sub_(0.5)
        y = self.conv(x)
        z = self.relu(self.same(y))
        return self.conv(z) + y


@pytest.mark.parametrize("model", [_Offset(), _Aliased()], ids=["offset", "aliased"])
def test_one_example_image_stands_for_any(model: nn.Module) -> None:
    given = nets.example(1)
    before = given.clone()
    for name in nets.ON_A_CPU:
        fused = dsp_kernels.fuse(model.eval(), given, backend=name)
        assert torch.equal(given, before)
        for x in (nets.example(5, seed=5), torch.randn(2, 3, 12, 12)):
            with torch.no_grad():
                torch.testing.assert_close(fused(x.clone()), model(x.clone()), rtol=1e-4, atol=1e-5)


class _Cut(nn.Module):
    """A subscript between two convolutions; there are as many columns as channels."""

    def __init__(self, cut: Callable[[Tensor], Tensor], width: int) -> None:
        super().__init__()
        self.cut = cut
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.cut(self.first(x).relu()).relu())


@pytest.mark.parametrize(
    ("cut", "width"),
    [
        (lambda y: y[..., 1:-1], 8),
        (lambda y: y[..., :6], 8),
        (lambda y: y[:, ..., 2:], 8),
        (lambda y: y[..., 1:4, :, :], 3),
        (lambda y: y[:, 1:4, ...], 3),
    ],
    ids=["inner columns", "first columns", "last columns", "channels from the end", "channels"],
)
def test_a_subscript_with_an_ellipsis_cuts_what_it_says(cut: Callable[[Tensor], Tensor], width: int) -> None:
    torch.manual_seed(0)
    model = _Cut(cut, width).eval()
    for name in nets.ON_A_CPU:
        fused = dsp_kernels.fuse(model, nets.example(), backend=name)
        with torch.no_grad():
            torch.testing.assert_close(fused(nets.example(3)), model(nets.example(3)), rtol=1e-4, atol=1e-5)
