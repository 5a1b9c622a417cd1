"""Whole networks by the native executor against the model they were made from."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from native_nets import MODELS, Flat, Mixed, Net
from torch import Tensor, nn

from dsp_kernels import fuse
from dsp_kernels.program.steps import TorchStep
from dsp_kernels.run.cpu.extension import native
from dsp_kernels.run.cpu.program import segments


def seeded(make: Callable[[], nn.Module], *size: int) -> tuple[nn.Module, Any]:
    """A model in eval mode, and the same fused with an example of this size."""
    torch.manual_seed(0)
    model = make().eval()
    return model, fuse(model, torch.randn(size), backend="cpu")


def check(fused: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(24))
def test_random_networks(seed: int, isa: str) -> None:
    model = Net(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    hw = (23, 18) if seed % 3 else (32, 32)
    fused = fuse(model, torch.randn(2, 3, *hw, generator=generator), backend="cpu")  # compares them too
    assert not any(isinstance(step, TorchStep) for step in fused.program.steps)
    # Batches and image sizes other than the example's; 17 is a whole block and a remainder of one.
    for batch, size in ((1, hw), (3, (32, 19)), (17, (21, 33)), (8, hw)):
        x = torch.randn(batch, 3, *size, generator=generator)
        with torch.no_grad():
            expected = model(x)
        assert (fused(x) - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1.0)
    assert fused(torch.empty(0, 3, *hw)).shape == (0, 11)


@pytest.mark.parametrize("name", MODELS)
def test_views_products_and_pools_are_one_native_segment(name: str, isa: str) -> None:
    model, fused = seeded(MODELS[name], 2, 3, 12, 12)
    eager = fuse(model, torch.randn(2, 3, 12, 12), backend="eager")
    assert [part.native for part in segments(fused.program)] == [True]
    for batch, hw in ((1, (12, 12)), (2, (7, 9)), (3, (9, 17)), (8, (12, 12)), (33, (6, 6))):
        x = torch.randn(batch, 3, *hw)
        check(fused, model, x)
        check(eager, model, x)


class Added(nn.Module):
    """A residual that is an input, which lies at the beginning of the memory."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 64, 3)

    def forward(self, r: Tensor, x: Tensor) -> Tensor:
        return self.conv(x) + r


@pytest.mark.parametrize("side", [3, 5, 7])
def test_a_residual_of_small_maps_is_an_input(side: int) -> None:
    model = Added().eval()
    inputs = torch.randn(1, 64, side, side), torch.randn(1, 64, side + 2, side + 2)
    with torch.no_grad():
        expected = model(*inputs)
    torch.testing.assert_close(fuse(model, inputs, backend="cpu")(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_a_view_as_a_map_keeps_the_sizes_that_the_code_computes() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            return F.relu(x).flatten(1).view(b, c, h, w)

    check(fuse(Model().eval(), torch.randn(2, 4, 8, 8)), Model().eval(), torch.randn(2, 4, 4, 16))


@pytest.mark.parametrize("make", [nn.MaxPool2d, nn.AvgPool2d])
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(2, 2, 0), (3, 2, 0), (3, 2, 1), (3, 3, 1)])
def test_pools_that_count_a_partial_window(make: Any, kernel: int, stride: int, padding: int) -> None:
    pool = make(kernel, stride, padding, ceil_mode=True)
    for size in range(1, 8):  # one pixel too: timm's shortcuts pool 1x1 maps
        x = torch.randn(2, 3, size, size)
        model = nn.Sequential(nn.Conv2d(3, 4, 1), pool).eval()
        if size + 2 * padding > kernel - stride:
            check(fuse(model, x, backend="cpu"), model, x)


@pytest.mark.parametrize("images", [1, 2, 4, 8, 16])
def test_a_factor_of_one_pixel_at_every_interleaving(images: int, isa: str) -> None:
    network = native().Network(isa)  # type: ignore[union-attr]
    x, gate = network.input(3), network.input(3)
    network.output(network.product(gate, x, "relu"))
    a, b, y = torch.randn(16, 3, 5, 7), torch.randn(16, 3, 1, 1), torch.full((16, 3, 5, 7), torch.nan)
    network.run([a.numpy(), b.numpy()], [y.numpy()], 1, images)
    assert torch.equal(y, F.relu(a * b))


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_linear_over_feature_maps(batch: int) -> None:
    model, fused = seeded(Flat, 2, 2, 4, 6)
    check(fused, model, torch.randn(batch, 2, 4, 6))


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_plain_pytorch_between_native_segments(batch: int) -> None:
    model, fused = seeded(Mixed, 2, 3, 9, 7)
    kinds = [part.native for part in segments(fused.program)]
    assert kinds.count(True) == 2
    assert False in kinds
    assert "plain PyTorch" in fused.explain()
    check(fused, model, torch.randn(batch, 3, 9, 7))


@pytest.mark.usefixtures("_two_threads")
def test_verbose_explain_says_what_is_launched() -> None:
    _, fused = seeded(lambda: nn.Sequential(nn.Conv2d(3, 5, 1), nn.MaxPool2d(2)), 3, 3, 8, 8)
    conv, pool = fused.explain(verbose=True).splitlines()[1:]
    assert "; conv in tiles of " in conv
    for line in (conv, pool):
        assert "(2 images, 1 interleaved, 2 threads on blocks)" in line
        assert "(1 images, 1 interleaved, 2 threads together" in line
    assert "images" not in "".join(fused.explain().splitlines()[1:])


def test_any_strides_of_the_input() -> None:
    _, fused = seeded(Mixed, 2, 3, 9, 7)
    x = torch.randn(4, 3, 9, 7)
    expected = fused(x)
    big = torch.zeros(8, 5, 20, 9)
    sliced = big[::2, 1:4, 0:18:2, 1:8]
    sliced.copy_(x)
    for view in (x.contiguous(memory_format=torch.channels_last), sliced, x.flip(3).flip(3)):
        assert torch.equal(fused(view), expected)


@pytest.mark.parametrize("example", [(3, 3, 8, 6), (1, 3, 2, 2)], ids=["map", "single pixel"])
def test_a_network_that_ends_in_a_flattened_map(example: tuple[int, ...]) -> None:
    layers = nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
    model, fused = seeded(lambda: nn.Sequential(*layers), *example)
    check(fused, model, torch.randn(3, 3, 8, 6))


class FlattenedHead(nn.Module):
    def __init__(self, head: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 4)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x))


HEADS = {
    "first": lambda y: y.flatten(1)[:, :6],
    "summed": lambda y: y.flatten(1)[:, :6].sum(1),
    "middle": lambda y: y.flatten(1).relu()[:, 1:5].sigmoid(),
    "last": lambda y: y.flatten(1)[:, -3:],
    "half": lambda y: y.relu().flatten(1).chunk(2, 1)[0],
    "clamped": lambda y: y.flatten(1).clamp(-0.5, 0.5).sigmoid(),
    "halves": lambda y: torch.cat(y.flatten(1).chunk(2, 1)[::-1], 1),
    "concatenated": lambda y: torch.cat([y.flatten(1), F.max_pool2d(y, 1, 2).flatten(1)], 1),
    "added": lambda y: y.flatten(1) + y.relu().flatten(1),
    "of one pixel": lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1)[:, :6],
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("sizes", [(8, 8), (4, 7), (8, 4)])
def test_indexing_the_features_of_a_flattened_map(head: str, sizes: tuple[int, int]) -> None:
    """If the example's map is one pixel, features coincide with channels; for another image they do not."""
    model, fused = seeded(lambda: FlattenedHead(HEADS[head]), 1, 3, sizes[0], sizes[0])
    x = torch.randn(2, 3, sizes[1], sizes[1])
    assert fused(x).shape == model(x).shape
    check(fused, model, x)


def test_nan_passes_activations_and_pools() -> None:
    """A ReLU in PyTorch keeps NaN; a maximum instruction may not."""
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 2)
    _, fused = seeded(lambda: nn.Sequential(*layers), 1, 1, 4, 4)
    x = torch.randn(3, 1, 4, 4)
    x[1, 0, 2, 2] = float("nan")
    assert fused(x).isnan().any(1).tolist() == [False, True, False]


def test_gates_of_nan_infinity_and_large_numbers() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sigmoid(), nn.Hardsigmoid()).eval()
    x = torch.tensor([0.0, float("nan"), float("inf"), -float("inf"), 200.0, -200.0]).view(1, 1, 1, 6)
    nn.init.ones_(model[0].weight), nn.init.zeros_(model[0].bias)
    fused = fuse(model, torch.randn(1, 1, 1, 6), backend="cpu")
    torch.testing.assert_close(fused(x), model(x).detach(), rtol=1e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(
    "name",
    [
        "densenet121",  # nested concatenations
        "efficientnet_b0",  # squeeze-excite
        "googlenet",  # inception
        "mnasnet0_5",
        "mobilenet_v3_small",
        "regnet_y_400mf",
        "shufflenet_v2_x0_5",  # channel shuffles
        "squeezenet1_0",  # fire modules
    ],
)
def test_torchvision_networks_are_one_native_segment(name: str) -> None:
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
