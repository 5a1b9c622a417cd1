"""Concatenations, products, splits and shuffles of channels inside one native run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from test_native_op import ISAS, need
from torch import Tensor, nn

from dsp_kernels import fuse
from dsp_kernels.program.steps import TorchStep
from dsp_kernels.run.cpu.extension import native
from dsp_kernels.run.cpu.program import segments


class Dense(nn.Module):
    """Concatenations of concatenations, which norms, windows, strides, pools and the output read."""

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
    """Squeeze-excite in two ways of writing it, and a product of two maps that replaces neither."""

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
    """Chunks, slices and both ways of shuffling; an add in place must not spoil what a view still reads."""

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
    """Adaptive pools that divide the map and that do not, with a classifier over what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d((3, 4))
        self.linear = nn.Linear(72, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.pool(F.relu(self.conv(x))).flatten(1))


MODELS = {"dense": Dense, "excite": Excite, "shuffle": Shuffle, "pools": Pools}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", MODELS)
def test_one_native_run(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need(isa, monkeypatch)
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    fused = fuse(model, torch.randn(2, 3, 12, 12), backend="cpu")
    eager = fuse(model, torch.randn(2, 3, 12, 12), backend="eager")
    assert not any(isinstance(step, TorchStep) for step in fused.program.steps)
    assert [part.native for part in segments(fused.program)] == [True]
    for batch, hw in ((1, (12, 12)), (2, (7, 9)), (3, (9, 17)), (8, (12, 12)), (33, (6, 6))):
        x = torch.randn(batch, 3, *hw)
        with torch.no_grad():
            expected = model(x)
        for network in (fused, eager):
            torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("images", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("isa", ISAS)
def test_a_factor_of_one_pixel_at_every_interleaving(
    images: int, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    need(isa, monkeypatch)
    network = native().Network(isa)  # type: ignore[union-attr]
    x, gate = network.input(3), network.input(3)
    network.output(network.product(gate, x, "relu"))
    a, b, y = torch.randn(16, 3, 5, 7), torch.randn(16, 3, 1, 1), torch.full((16, 3, 5, 7), torch.nan)
    network.run([a.numpy(), b.numpy()], [y.numpy()], 1, images)
    assert torch.equal(y, F.relu(a * b))


def test_refuses_what_cannot_be() -> None:
    network = native().Network("")  # type: ignore[union-attr]
    x, other = network.input(3), network.input(4)
    with pytest.raises(ValueError, match="out of range"):
        network.select(x, [0, 3])
    with pytest.raises(ValueError, match="needs a channel"):
        network.select(x, [])
    with pytest.raises(ValueError, match="different numbers of channels"):
        network.product(x, other, "none")
    with pytest.raises(ValueError, match="changes 0"):
        network.conv(x, -1, 1, (1, 1), (1, 1), (0, 0), (1, 1), "sigmoid", [], [], [], None)
    network.output(network.concat([x, other]))
    with pytest.raises(ValueError, match="cannot be concatenated"):
        network.output_shapes([(4, 4), (4, 5)])


def test_a_number_that_is_not_one_passes_a_gate() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sigmoid(), nn.Hardsigmoid()).eval()
    x = torch.tensor([0.0, float("nan"), float("inf"), -float("inf"), 200.0, -200.0]).view(1, 1, 1, 6)
    nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
    fused = fuse(model, torch.randn(1, 1, 1, 6), backend="cpu")
    torch.testing.assert_close(fused(x), model(x).detach(), rtol=1e-6, atol=1e-7, equal_nan=True)


# With features of all these: nested concatenations, fire modules, inception, squeeze-excite, shuffles.
@pytest.mark.parametrize(
    "name",
    [
        "densenet121",
        "efficientnet_b0",
        "googlenet",
        "mnasnet0_5",
        "mobilenet_v3_small",
        "regnet_y_400mf",
        "shufflenet_v2_x0_5",
        "squeezenet1_0",
    ],
)
def test_known_networks_are_one_native_run(name: str) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    settings = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = getattr(models, name)(weights=None, **settings).eval()
    fused = fuse(model, torch.randn(1, 3, 64, 64), backend="cpu")
    assert [part.native for part in segments(fused.program)] == [True], fused.explain()
    x = torch.randn(2, 3, 80, 72)
    with torch.no_grad():
        expected = model(x)
    assert (fused(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
