"""Networks whose forward() needs sizes as numbers are traced, packed, fused and saved for one size."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels import fuse
from dsp_kernels.errors import DSPShapeError, DSPTraceError
from dsp_kernels.graph.network import trace
from dsp_kernels.graph.size_check import SizeCheck
from dsp_pruning import pack, unpack
from dsp_pruning.export import export_pt2

WIDTH = 8


class Parts(nn.Module):
    """conv - norm - relu - reader. Subclasses add what torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.branches = nn.ModuleDict({"a": nn.Conv2d(WIDTH, WIDTH, 1), "b": nn.Conv2d(WIDTH, WIDTH, 1)})
        self.reader = nn.Conv2d(WIDTH, 6, 3, padding=1)
        self.classifier = nn.Linear(6, 4)

    def inner(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.stem(x)))

    def head(self, y: Tensor) -> Tensor:
        return self.classifier(F.relu(self.reader(y)).mean((2, 3)))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.inner(x))


class SizeAssert(Parts):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] % 2 == 0, "even heights"
        return self.head(self.inner(x))


class SamePadding(Parts):
    """TensorFlow's padding, computed from the size as in timm."""

    def pad(self, x: Tensor, kernel: int, stride: int) -> Tensor:
        height, width = (max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        return F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.pad(self.inner(x), 3, 2), 3, 2)
        return self.head(y)


class OtherEntry(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm.forward(self.stem.forward(x)))
        if y.shape[1] > 2 and y.shape[-1] > 3:
            y = F.max_pool2d(y, 2)
        return self.head(y)


class Blocks(Parts):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[3] < 4:
            return self.head(F.interpolate(self.inner(x), scale_factor=2.0))
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            y = self.inner(x)
        left, right = y[:, :, :, :].chunk(2, 1)
        return self.head(torch.cat([left, right], 1))


class Nested(Parts):
    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.inner(x)
        if y.shape[2] != y.shape[3]:
            y = y.flatten(2).mean(2)[:, :, None, None]
        return {"logits": self.head(y), "maps": [y]}


class Keywords(Parts):
    def run(self, name: str, *args: Tensor, **kwargs: Any) -> Tensor:
        return self.branches[name](*args, **kwargs)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        y = self.inner(x)
        if x.dim() == 4 and len(x.shape) == x.ndim and y.size(1) == y.shape[1] and not kwargs:
            for name in self.branches:
                y = y + self.run(name, y, **kwargs)
        return self.head(y)


class Neck(Parts):
    """Parts of known number, as in YOLOv8."""

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.inner(x).chunk(2, 1))
        y.extend(F.relu(part) for part in y[-1].split([WIDTH // 4, WIDTH // 4], dim=1))
        first, *others = torch.cat(y, 1).split(WIDTH // 2, dim=1)
        return self.head(torch.cat([others[-1], first], 1))


FOR_ONE_SIZE = (SizeAssert, SamePadding, OtherEntry, Blocks, Nested)
FOR_ANY_SIZE = (Keywords, Neck)


def made(kind: type[Parts], seed: int = 0) -> Parts:
    """float64. Filters 1, 2 and 5 of the stem are pruned: after the norm they are 0, 0 and a constant."""
    torch.manual_seed(seed)
    model = kind().double().eval()
    with torch.no_grad():
        model.norm.running_mean.uniform_(-0.5, 0.5)
        model.norm.bias.uniform_(-0.5, 0.5)
        model.stem.weight[[1, 2, 5]] = 0
        model.stem.bias[[1, 2]] = 0
        model.norm.running_mean[[1, 2]] = 0
        model.norm.bias[[1, 2]] = 0
        model.norm.bias[5] = 2.0
        for branch in model.branches.values():
            branch.weight[[1, 2]] = 0
            branch.bias[[1, 2]] = 0
    mask = (torch.rand(6, WIDTH) < 0.7)[:, :, None, None].double()
    model.reader.register_buffer("mask", mask)
    model.reader.weight.data.mul_(mask)
    return model


def images(batch: int = 2, height: int = 12, width: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(batch + height)
    return torch.randn(batch, 3, height, width, generator=generator, dtype=torch.float64)


def close(left: Any, right: Any) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", [*FOR_ONE_SIZE, *FOR_ANY_SIZE], ids=lambda kind: kind.__name__)
def test_every_form_of_a_packed_network(kind: type[Parts], tmp_path: Path) -> None:
    model = made(kind)
    packed = pack(model, images())
    # Chunks have to stay equal, and an output keeps its channels.
    assert packed.stem.out_channels == (WIDTH if kind in (Blocks, Nested, Neck) else WIDTH - 2)
    assert ("needs images of 12 x 12" in str(packed.packing)) == (kind in FOR_ONE_SIZE)
    dsp_kernels.save(packed, tmp_path / "net", images())
    loaded = dsp_kernels.load(tmp_path / "net")
    networks = [packed, copy.deepcopy(packed), loaded]
    if kind is not Nested:
        networks += [fuse(packed, images()), fuse(loaded, images())]
    others = [unpack(packed)]
    if kind is not Blocks:  # torch.export cannot write its disabled autocast
        export_pt2(packed, tmp_path / "net.pt2", images())
        others.append(torch.export.load(tmp_path / "net.pt2").module())
    for network in (*networks, *others):
        for x in (images(1), images(2), images(5)):
            close(network(x), model(x))
    other = images(2, 16, 20)
    for network in networks:
        if kind in FOR_ANY_SIZE:
            close(network(other), model(other))
        else:
            with pytest.raises(DSPShapeError, match=r"right only for (height|width) == 12"):
                network(other)


def test_the_graph_is_that_of_torch_fx() -> None:
    nodes = [[(node.kind, node.path) for node in trace(made(kind), images())] for kind in (Parts, SizeAssert)]
    assert [node for node in nodes[1] if node[0] != "size_check"] == nodes[0]


def test_other_conditions_are_reported_in_words() -> None:
    packed = pack(nn.Sequential(SizeCheck(("height % 2 == 0", "width >= 4")), made(Parts)), images())
    assert str(packed.packing).endswith("needs images with height % 2 == 0 and width >= 4")


class Counts(Parts):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] >= 0:
            self.calls += 1
        return self.head(self.inner(x))


class Autocast(Parts):
    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] > 0
        with torch.autocast("cpu", torch.bfloat16):
            y = self.inner(x)
        return self.head(y.to(x))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Counts, "writes into calls in eval mode"), (Autocast, "turns autocast on by itself")],
)
def test_the_reason_why_a_model_cannot_be_traced(kind: type[Parts], reason: str) -> None:
    model = made(kind)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(DSPTraceError, match=reason):
        trace(model, images())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Auxiliary(Keywords):
    """A head that runs in training mode only."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Conv2d(WIDTH, 3, 1)

    def forward(self, x: Tensor, **kwargs: Any) -> Any:
        y = self.inner(x)
        if x.shape[2] > 1 and self.training:
            return self.head(y), self.aux(y)
        return self.head(y)


def test_the_input_of_a_head_for_training_keeps_its_channels() -> None:
    model = made(Auxiliary)
    packed = pack(model, images())
    close(packed(images()), model(images()))
    assert packed.stem.out_channels == WIDTH
    assert any("runs in training only" in barrier.reason for barrier in packed.packing.barriers)
    assert packed.train()(images())[1].shape == (2, 3, 12, 12)
