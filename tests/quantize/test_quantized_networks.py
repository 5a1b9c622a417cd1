"""quantize(): near the float network, right answers on real ones, files, copies, refusals."""

import copy
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from dsp_benchmarks.subjects.networks import NetworkSource, load_network
from families import FAMILIES
from torch import Tensor, nn

import dsp_kernels
from dsp_kernels.errors import DSPBackendError, DSPError, DSPShapeError
from dsp_kernels.program.steps import ConvStep, LinearStep

RELEASED = [f"resnet{depth}_g{groups}" for depth in (20, 56) for groups in (2, 3, 4)]


def test_the_released_networks_answer_as_well_as_in_float32(shared: Path) -> None:
    """Each loses at most 5 right answers of 1017, all together at most 15. Calibrated on training images."""
    lost = {}
    for name in RELEASED:
        network = load_network(NetworkSource(name))
        assert network.labelled is not None
        x, labels = network.labelled.images, network.labelled.labels
        quantized = dsp_kernels.quantize(network.packed, network.calibration)
        assert not quantized.program.notes  # no step computes in float
        fused = dsp_kernels.fuse(network.packed, network.example), dsp_kernels.fuse(quantized)
        assert torch.equal(fused[1](x[:8]), quantized(x[:8]))
        right = [int((run(x).argmax(1) == labels).sum()) for run in fused]
        lost[name] = right[0] - right[1]
    assert max(lost.values()) <= 5, lost
    assert sum(lost.values()) <= 15, lost


def tensors(answer: Any) -> list[Tensor]:
    return list(answer) if isinstance(answer, tuple) else [answer]


def allowed(quantized: dsp_kernels.QuantizedNetwork) -> float:
    """Root mean square error of the answers relative to their deviation, at most.

    A value whose largest number is 4.5 standard deviations (of a hundred thousand normal ones) has steps of
    4.5 / 127 of a deviation, so rounding adds 4.5 / 127 / sqrt(12) = 1.0 % of it; weights the same. The
    errors of the layers are independent. Twice that, because later layers may amplify.
    """
    steps = quantized.program.steps
    layers = sum(isinstance(s, ConvStep | LinearStep) and s.requantize is not None for s in steps)
    return 2 * math.sqrt(2 * layers) * 4.5 / 127 / math.sqrt(12)


def check_near(net: nn.Module, side: int) -> dsp_kernels.QuantizedNetwork:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(12, 3, side, side, generator=generator)
    quantized, x = dsp_kernels.quantize(net, images[:8]), images[8:]
    with torch.no_grad():
        expected, got = tensors(net(x)), tensors(quantized(x))
    fused = tensors(dsp_kernels.fuse(quantized)(x))
    for a, b, c in zip(expected, got, fused, strict=True):
        assert (a - b).square().mean().sqrt() <= allowed(quantized) * a.std()
        assert (b - c).square().mean().sqrt() <= allowed(quantized) * a.std() / 4
    return quantized


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_stays_near_its_float_network(name: str) -> None:
    torch.manual_seed(0)
    if name == "FPN":
        pytest.importorskip("torchvision")
    make, side, _ = FAMILIES[name]
    check_near(make().eval(), side)


@pytest.mark.parametrize("name", ["mobilenetv2_100", "ghostnet_100"])
def test_a_network_of_timm_stays_near_its_float_network(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    check_near(timm.create_model(name).eval(), 32)


class Gated(nn.Module):
    """Two concatenated branches of other ranges, a gate, an image added back, pools of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.mixed, self.squeeze = nn.Conv2d(12, 12, 3, 2, 1, groups=3), nn.Conv2d(12, 12, 1)
        self.back, self.classifier = nn.Conv2d(12, 3, 1), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.low(x).relu(), 5 * self.high(x)], 1)
        y = self.mixed(y).relu()
        y = y * torch.sigmoid(self.squeeze(y.mean((2, 3), keepdim=True)))
        y = nn.functional.avg_pool2d(nn.functional.max_pool2d(self.back(y), 3, 1, 1) + self.back(y), 2, 1)
        return self.classifier(nn.functional.interpolate(y, scale_factor=2).mean((2, 3)))


def test_scales_are_shared_where_values_are_moved_and_gates_stay_integers() -> None:
    torch.manual_seed(3)
    quantized = check_near(Gated().eval(), 17)
    grids = quantized.grids
    assert grids["cat"] == grids["relu"]
    assert grids["cat"].low < 0
    integers = {step.output for step in quantized.program.steps if step.output.endswith(".q")}
    assert {"cat.q", "mul.q", "max_pool2d.q", "add.q", "avg_pool2d.q", "interpolate.q"} <= integers
    assert dict(quantized.program.notes).keys() == {"sigmoid"}
    for size in ((9, 12), (5, 5), (31, 8)):  # of other images than those of calibration
        x = torch.randn(3, 3, *size)
        assert (quantized(x) - quantized.packed(x)).abs().max() < 0.1 * quantized.packed(x).abs().max()


def test_a_layer_that_is_kept_and_what_it_reads() -> None:
    net, x = nets.make("residual"), nets.example(30)
    quantized = dsp_kernels.quantize(net, x, "minmax", keep=["packed", "classifier"])
    assert dict(quantized.program.notes) == {"relu_1": "kept in float", "classifier": "kept in float"} | {
        "mean": "no layer of integers reads it",
        "pool": "no layer of integers reads it",
    }
    text = quantized.explain()
    assert "8-bit integers" in text
    assert ", float: kept in float" in text
    assert (quantized(x) - net(x)).abs().max() < 0.05 * net(x).abs().max()


def test_an_image_keeps_all_its_levels() -> None:
    """A sum of 27 products of weights up to 127 stays below 2^24 with 4892 levels on each side of 0."""
    quantized = dsp_kernels.quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), nets.example(8))
    (grid,) = quantized.grids.values()
    assert (grid.low, grid.high) == (-4892, 4892)
    assert 27 * 127 * 4892 < 2**24 <= 27 * 127 * 4893


@pytest.mark.parametrize("name", nets.NAMES)
def test_files_and_copies_give_the_same_answers(name: str, tmp_path: Path) -> None:
    x = nets.example(20)
    keep = ["classifier"] if name == "residual" else []
    quantized = dsp_kernels.quantize(nets.make(name), x, keep=keep)
    dsp_kernels.save(quantized, tmp_path / "net")
    loaded = dsp_kernels.load(tmp_path / "net")
    assert isinstance(loaded, dsp_kernels.QuantizedNetwork)
    assert list(loaded.keep) == keep
    dsp_kernels.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()
    for made in (loaded, copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(made(x), quantized(x))


def quantize(net: nn.Module | None = None, **given: Any) -> dsp_kernels.QuantizedNetwork:
    return dsp_kernels.quantize(net or nets.make("residual"), **{"images": nets.example(4), **given})


REFUSED: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "method": (lambda: quantize(method="max"), DSPError, "method is 'max'; expected mse or minmax"),
    "keep": (
        lambda: quantize(keep=["clasifier"]),
        DSPError,
        "'clasifier', which is no layer of .* is 'classifier'",
    ),
    "keep that is text": (lambda: quantize(keep="stem"), DSPError, "expected a collection of names"),
    "no images": (lambda: quantize(images=[]), DSPShapeError, "no calibration images"),
    "images of two sizes": (
        lambda: quantize(images=[nets.example(2), nets.example(2, size=9)]),
        DSPShapeError,
        "several sizes",
    ),
    "infinite images": (
        lambda: quantize(images=nets.example(4) * math.inf),
        DSPError,
        "not finite for the calibration images",
    ),
    "nothing for integers": (
        lambda: quantize(nn.Sequential(nn.Conv2d(3, 4, 1)), keep=["0"]),
        DSPError,
        "no layer of this network can compute in integers: kept in float",
    ),
    "quantised twice": (lambda: quantize(quantize()), DSPBackendError, "quantised already"),
    "training": (lambda: quantize().train()(nets.IMAGE), DSPError, "cannot be trained"),
    "half": (lambda: quantize().half(), DSPBackendError, "float16 cannot hold the values"),
    "fused in bfloat16": (
        lambda: dsp_kernels.fuse(quantize(), dtype=torch.bfloat16),
        DSPBackendError,
        "a quantised network computes in integers",
    ),
    "fused without an example": (lambda: dsp_kernels.fuse(nets.make("residual")), DSPShapeError, "example"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_says_why(name: str) -> None:
    run, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        run()
