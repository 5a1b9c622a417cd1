"""Whole networks by the native executor against the model they were made from."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_native_op import ISAS, need
from torch import Tensor, nn

from dsp_kernels import GroupStructure, PackedConv2d, fuse
from dsp_kernels.program.steps import TorchStep
from dsp_kernels.run.cpu.program import segments


def random_structure(rng: random.Random, c: int, o: int) -> GroupStructure:
    """Overlapping inputs, absent outputs, groups that read nothing, sometimes no group at all."""
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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("seed", range(24))
def test_random_networks(seed: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(isa, monkeypatch)
    model = Net(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    hw = (23, 18) if seed % 3 else (32, 32)
    fused = fuse(model, torch.randn(2, 3, *hw, generator=generator), backend="cpu")  # which compares them too
    assert not any(isinstance(step, TorchStep) for step in fused.program.steps)
    # Other batches and other image sizes than the example's; 17 is a whole block and a rest of one.
    for batch, size in ((1, hw), (3, (32, 19)), (17, (21, 33)), (8, hw)):
        x = torch.randn(batch, 3, *size, generator=generator)
        with torch.no_grad():
            expected = model(x)
        assert (fused(x) - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1.0)
    assert fused(torch.empty(0, 3, *hw)).shape == (0, 11)


class Flat(nn.Module):
    """A linear layer that reads whole maps, and a value that is needed twice."""

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
    """Native runs around operations that only PyTorch knows."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        gate = torch.tanh(y.mean((2, 3), keepdim=True))
        return F.relu(self.b(y * gate) + y)


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_linear_over_maps(batch: int) -> None:
    torch.manual_seed(0)
    model = Flat().eval()
    fused = fuse(model, torch.randn(2, 2, 4, 6), backend="cpu")
    x = torch.randn(batch, 2, 4, 6)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_plain_pytorch_between_native_runs(batch: int) -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    fused = fuse(model, torch.randn(2, 3, 9, 7), backend="cpu")
    kinds = [part.native for part in segments(fused.program)]
    assert kinds.count(True) == 2
    assert False in kinds
    assert "plain PyTorch" in fused.explain()
    x = torch.randn(batch, 3, 9, 7)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


def test_every_layout_of_the_input() -> None:
    torch.manual_seed(0)
    model = Mixed().eval()
    fused = fuse(model, torch.randn(2, 3, 9, 7), backend="cpu")
    x = torch.randn(4, 3, 9, 7)
    expected = fused(x)
    big = torch.zeros(8, 5, 20, 9)
    big[::2, 1:4, ::2, 1:8][:, :, :9] = x
    for view in (
        x.contiguous(memory_format=torch.channels_last),
        big[::2, 1:4, 0:18:2, 1:8],
        x.flip(3).flip(3),
    ):
        assert torch.equal(fused(view), expected)


def test_a_network_that_ends_in_a_flattened_map() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()).eval()
    x = torch.randn(3, 3, 8, 6)
    fused = fuse(model, x, backend="cpu")
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-6)
    # The example's map may be a single pixel where a later one is not.
    fused = fuse(model, torch.randn(1, 3, 2, 2), backend="cpu")
    torch.testing.assert_close(fused(x), model(x), rtol=1e-5, atol=1e-6)


class FlattenedHead(nn.Module):
    """A head that counts the features of a map of any size."""

    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


@pytest.mark.parametrize(
    "head",
    [
        lambda y: y.flatten(1)[:, :6],
        lambda y: y.flatten(1)[:, :6].sum(1),
        lambda y: y.flatten(1).relu()[:, 1:5].sigmoid(),
        lambda y: y.flatten(1)[:, -3:],
        lambda y: y.relu().flatten(1).chunk(2, 1)[0],
        lambda y: y.flatten(1).clamp(-0.5, 0.5).sigmoid(),
        lambda y: torch.cat(y.flatten(1).chunk(2, 1)[::-1], 1),
        lambda y: torch.cat([y.flatten(1), F.max_pool2d(y, 1, 2).flatten(1)], 1),
        lambda y: y.flatten(1) + y.relu().flatten(1),
        lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1)[:, :6],
    ],
    ids=["cut", "summed", "middle", "end", "half", "clamped", "halves", "joined", "added", "of one pixel"],
)
@pytest.mark.parametrize("sizes", [(8, 8), (4, 7), (8, 4)])
def test_features_of_a_flattened_map_are_counted(
    head: Callable[[Tensor], Tensor], sizes: tuple[int, int]
) -> None:
    """The example's map may be one pixel, with as many features as channels, where another image's is not."""
    torch.manual_seed(0)
    model = FlattenedHead(head).eval()
    fused = fuse(model, torch.randn(1, 3, sizes[0], sizes[0]), backend="cpu")
    x = torch.randn(2, 3, sizes[1], sizes[1])
    expected = model(x)
    assert fused(x).shape == expected.shape
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)


def test_not_a_number_is_not_hidden() -> None:
    """A ReLU in PyTorch keeps NaN; a maximum instruction may not."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)
    )
    fused = fuse(model.eval(), torch.randn(1, 1, 4, 4), backend="cpu")
    x = torch.randn(3, 1, 4, 4)
    x[1, 0, 2, 2] = float("nan")
    assert fused(x).isnan().any(1).tolist() == [False, True, False]
