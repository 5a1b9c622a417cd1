"""pack with every operation it supports, and constants everywhere: channels are removed exactly or kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import masked
from torch import Tensor, nn

from dsp_kernels import PackedConv2d, fuse, swap
from dsp_pruning import pack
from dsp_pruning.packing.unpack import unpack

WIDTH = 12


class Net(nn.Module):
    """stem - norm - relu, then an operation given as a function, then a 1x1 or a padded 3x3 reader."""

    def __init__(self, middle: Callable[[Any, Tensor], Tensor], out: int = WIDTH, kernel: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.other = nn.Conv2d(3, WIDTH, 1)
        self.gate = nn.Conv2d(WIDTH, WIDTH, 1)
        self.squeeze = nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, WIDTH), nn.Sigmoid())
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.wide = nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, groups=WIDTH, bias=False)
        self.grouped = nn.Conv2d(WIDTH, 8, 3, padding=1, groups=4)
        self.same = nn.Conv2d(WIDTH, WIDTH, 2, padding="same")
        self.reflect = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, padding_mode="reflect")
        self.up = nn.ConvTranspose2d(WIDTH, 5, 2, stride=2)
        self.instance = nn.InstanceNorm2d(WIDTH, affine=True)
        self.layer = nn.GroupNorm(3, WIDTH)
        self.single = nn.GroupNorm(WIDTH, WIDTH)
        self.response = nn.LocalResponseNorm(3)
        self.prelu = nn.PReLU()
        self.shuffle = nn.ChannelShuffle(3)
        self.scale = nn.Parameter(torch.rand(1, WIDTH, 1, 1))
        self.middle = middle
        self.reader = nn.Conv2d(out, 6, kernel, padding=kernel // 2)
        self.classifier = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.middle(self, F.relu(self.norm(self.stem(x))), x) if _takes_image(self.middle) else None
        y = self.middle(self, F.relu(self.norm(self.stem(x)))) if y is None else y
        return self.classifier(F.relu(self.reader(y)).mean((2, 3)))


def _takes_image(function: Callable[..., Tensor]) -> bool:
    return function.__code__.co_argcount == 3


def shuffle(x: Tensor) -> Tensor:
    batch, channels, height, width = x.size()
    x = x.view(batch, 3, channels // 3, height, width)
    return torch.transpose(x, 1, 2).contiguous().view(batch, channels, height, width)


def stochastic_depth(x: Tensor, p: float, mode: str, training: bool) -> Tensor:
    """torchvision's, where it is installed; it does nothing in eval mode."""
    torchvision = pytest.importorskip("torchvision")
    return torchvision.ops.stochastic_depth(x, p, mode, training)


def squeeze_excite(m: nn.Module, y: Tensor) -> Tensor:
    batch, channels, _, _ = y.size()
    gate = m.squeeze(F.adaptive_avg_pool2d(y, 1).view(batch, channels)).view(batch, channels, 1, 1)
    return y * gate.expand_as(y)


def product_of_halves(m: nn.Module, y: Tensor) -> Tensor:
    left, right = y.chunk(2, 1)
    return left * right


# name -> operation, width of its output, which of the dead channels before it are removed
OPERATIONS: dict[str, tuple[Callable[..., Tensor], int, str]] = {
    "nothing": (lambda m, y: y, WIDTH, "all"),
    "concat": (lambda m, y, x: torch.cat([y, m.other(x), y], 1), 3 * WIDTH, "all"),
    "squeeze-excite": (lambda m, y: y * torch.sigmoid(m.gate(y.mean((2, 3), keepdim=True))), WIDTH, "all"),
    "squeeze-excite, hard": (
        lambda m, y: F.hardsigmoid(m.gate(F.adaptive_avg_pool2d(y, 1))).mul(y),
        WIDTH,
        "all",
    ),
    # Gates of linear layers shrink with what they scale.
    "gate, view and expand_as": (squeeze_excite, WIDTH, "all"),
    "gate, new axes": (lambda m, y: y * m.squeeze(y.mean((2, 3)))[:, :, None, None], WIDTH, "all"),
    "gate, unsqueeze": (
        lambda m, y: y * m.squeeze(y.flatten(2).mean(2)).unsqueeze(-1).unsqueeze(-1),
        WIDTH,
        "all",
    ),
    "gate, amax": (lambda m, y: y * m.squeeze(y.amax((2, 3))).reshape(y.size(0), -1, 1, 1), WIDTH, "all"),
    "gate, squeeze": (
        lambda m, y: y * m.squeeze(F.adaptive_max_pool2d(y, 1).squeeze(-1).squeeze(-1))[..., None, None],
        WIDTH,
        "all",
    ),
    "sigmoid": (lambda m, y: torch.sigmoid(y), WIDTH, "all"),
    "gelu, tanh, scalars": (lambda m, y: 1 - F.gelu(torch.tanh(y) * 3 + 0.5) / 2, WIDTH, "all"),
    "prelu": (lambda m, y: m.prelu(y - 1), WIDTH, "all"),
    "subtract the mean": (lambda m, y: y - y.mean((2, 3), keepdim=True), WIDTH, "all"),
    "depthwise": (lambda m, y: m.depthwise(y), WIDTH, "some"),
    "depthwise, two per channel": (lambda m, y: F.relu(m.wide(y)), 2 * WIDTH, "some"),
    "grouped": (lambda m, y: m.grouped(y), 8, "none"),
    "same padding": (lambda m, y: m.same(y), WIDTH, "some"),
    "reflect padding": (lambda m, y: m.reflect(y), WIDTH, "all"),
    "transposed": (lambda m, y: m.up(y), 5, "some"),
    "instance norm": (lambda m, y: F.relu(m.instance(y)), WIDTH, "some"),
    "group norm": (lambda m, y: m.layer(y), WIDTH, "none"),
    "group norm of single channels": (lambda m, y: F.relu(m.single(y)), WIDTH, "some"),
    "layer norm over channels": (
        lambda m, y: F.layer_norm(y.permute(0, 2, 3, 1), (WIDTH,)).permute(0, 3, 1, 2),
        WIDTH,
        "none",
    ),
    "local response norm": (lambda m, y: m.response(y), WIDTH, "none"),
    "stochastic depth": (lambda m, y: y + stochastic_depth(y, 0.2, "row", m.training), WIDTH, "all"),
    "dropouts": (lambda m, y: F.dropout2d(F.dropout(y, 0.5, m.training), training=m.training), WIDTH, "all"),
    "max pool": (lambda m, y: F.max_pool2d(y - 2, 3, 2, 1, ceil_mode=True), WIDTH, "all"),
    "average pool": (lambda m, y: F.avg_pool2d(y, 3, 2, 1), WIDTH, "some"),
    "average pool, padding not counted": (
        lambda m, y: F.avg_pool2d(y, 3, 2, 1, ceil_mode=True, count_include_pad=False),
        WIDTH,
        "all",
    ),
    "average pool, ceil": (lambda m, y: F.avg_pool2d(y, 3, 2, ceil_mode=True), WIDTH, "all"),
    "adaptive pool": (lambda m, y: F.adaptive_avg_pool2d(y, (3, 5)), WIDTH, "all"),
    "pad": (lambda m, y: F.pad(y, (1, 2, 0, 1)), WIDTH, "some"),
    "pad, reflected": (lambda m, y: F.pad(y, (1, 1, 2, 2), mode="reflect"), WIDTH, "all"),
    "interpolate": (
        lambda m, y: F.interpolate(y, scale_factor=2.0, mode="bilinear", align_corners=False),
        WIDTH,
        "all",
    ),
    "chunk": (product_of_halves, WIDTH // 2, "some"),
    "split by numbers": (lambda m, y: torch.cat(torch.split(y, [4, 8], 1)[::-1], 1), WIDTH, "none"),
    "slice": (lambda m, y: y[:, 3:], WIDTH - 3, "none"),
    # After an ellipsis these are columns, of which there are as many as channels.
    "cut columns": (lambda m, y: y[..., 1:-1], WIDTH, "all"),
    "first columns": (lambda m, y: y[:, ..., :8], WIDTH, "all"),
    "crop": (lambda m, y: y[:, :, 1:-1, 1:], WIDTH, "all"),
    "strided": (lambda m, y: y[..., ::2, 1::2], WIDTH, "all"),
    "one position": (lambda m, y: y[:, :, 0, 0][:, :, None, None], WIDTH, "all"),
    "repeated": (lambda m, y: y.mean((2, 3), keepdim=True).expand(-1, -1, 3, 4), WIDTH, "all"),
    "flattened": (lambda m, y: y.flatten(2).view(y.size(0), y.size(1), y.size(2), y.size(3)), WIDTH, "all"),
    "slice after an ellipsis": (lambda m, y: y[..., 3:, :, :], WIDTH - 3, "none"),
    "shuffle": (lambda m, y: shuffle(y), WIDTH, "some"),
    "shuffle, module": (lambda m, y: m.shuffle(y), WIDTH, "some"),
    "residual": (lambda m, y, x: F.relu(y + m.other(x)), WIDTH, "some"),
    "scale by a parameter": (lambda m, y: y * m.scale, WIDTH, "none"),
    "softmax": (lambda m, y: y.softmax(1), WIDTH, "none"),
    "max with indices": (lambda m, y: torch.max(y, 3, keepdim=True)[0], WIDTH, "none"),
    "permute": (lambda m, y: y.permute(0, 1, 3, 2).permute(0, 1, 3, 2), WIDTH, "none"),
    "twice": (lambda m, y: m.gate(F.relu(m.gate(y))), WIDTH, "some"),
}
DEAD = (1, 2, 5, 9)


def net(name: str, kernel: int, seed: int, constant: float | None = None) -> nn.Module:
    """Random; four filters of the stem are pruned, and their norm makes them 0, 0 and two constants."""
    torch.manual_seed(seed)
    middle, out, _ = OPERATIONS[name]
    model = Net(middle, out, kernel).double().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.5, 0.5)
        model.norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(model.norm.bias, -0.5, 0.5)
        model.stem.weight[list(DEAD)] = 0
        model.norm.weight[[1, 2]] = 0
        model.norm.bias[[1, 2]] = 0
        model.norm.bias[[5, 9]] = 2.0 if constant is None else constant
        if constant == 0:
            model.norm.weight[[5, 9]] = 0
        model.instance.bias[[1, 2]] = 0
        nn.init.uniform_(model.single.bias, -0.5, 0.5)
        model.single.bias[[1, 2]] = 0
        model.gate.weight[3:5] = 0
        model.other.weight[[1, 5]] = 0
        model.other.bias[1] = 0
        mask = (torch.rand(6, out) < 0.7)[:, :, None, None].double()
        model.reader.weight.mul_(mask)
    model.reader.register_buffer("mask", mask)
    return model


def test_a_convolution_called_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.reader = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.reader(input=torch.relu(self.first(input=x))).mean((2, 3))

    model = Named().double().eval()
    with torch.no_grad():
        model.reader.weight[:4, :4] = model.reader.weight[4:, 4:] = 0
    packed, x = pack(model, images(2, 12)), images(2, 12)
    assert isinstance(packed.reader, PackedConv2d)
    for other in (packed, fuse(packed, x), swap(copy.deepcopy(packed))):
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_outputs_are_those_of_the_masked_network(name: str, kernel: int, seed: int) -> None:
    model = net(name, kernel, seed)
    expected, packed = masked(model), pack(model, images(2, 12))
    for size in (12, 17 if name != "permute" else 12):
        x = images(3, size, seed)
        torch.testing.assert_close(packed(x), expected(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(unpack(packed)(x), expected(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
def test_dead_channels_are_removed_where_possible(name: str) -> None:
    """Zero channels are all removed, unless the operation keeps its channels: then the report names it."""
    model = net(name, 1, 0, constant=0.0)
    packed = pack(model, images(2, 12))
    stem = packed.stem
    left = stem.out_channels
    allowed = {"all": {WIDTH - 4}, "some": set(range(WIDTH + 1)), "none": {WIDTH}}
    assert left in allowed[OPERATIONS[name][2]], left
    barriers = [barrier for barrier in packed.packing.barriers if barrier.kept]
    assert bool(barriers) == (OPERATIONS[name][2] == "none" and name != "grouped"), barriers
    assert packed.norm.num_features == left
    over_channels = name in ("group norm", "local response norm")
    assert ("normalises over several channels together" in str(packed.packing)) == over_channels


def images(batch: int, size: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)
