"""pack on wrapped models, computed weights, unusual code, several inputs and examples that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import dsp_kernels
from dsp_kernels import PackedConv2d
from dsp_kernels.errors import (
    DSPError,
    DSPFormatError,
    DSPPruningError,
    DSPShapeError,
    DSPTraceError,
    DSPVerificationError,
)
from dsp_pruning import GroupWrapper, PruneWrapper, pack
from dsp_pruning.packing.pack import plain_copy
from dsp_pruning.packing.unpack import unpack

WIDTH = 8


class Net(nn.Module):
    """conv - norm - relu - conv - relu - mean - linear, with room for other code between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.norm, self.linear = nn.BatchNorm2d(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.a(x))))

    def head(self, y: Tensor) -> Tensor:
        return self.linear(F.relu(self.b(y)).mean((2, 3)))


def masked(model: nn.Module, gone: tuple[int, ...] = (1, 2, 5)) -> nn.Module:
    """Filters ``gone`` of ``a`` are pruned with norm and bias; ``b`` reads two patterns of the others."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.uniform_(-1, 1)
                module.running_var.uniform_(0.5, 2)
        rows, columns = torch.ones(WIDTH, 3, 1, 1), torch.ones(WIDTH, WIDTH, 1, 1)
        rows[list(gone)] = 0
        columns[:4, 6] = 0
        for conv, mask in ((model.a, rows), (model.b, columns)):
            conv.register_buffer("mask", mask)
            conv.weight.mul_(mask)
        for tensor in (model.a.bias, model.norm.weight, model.norm.bias):
            tensor[list(gone)] = 0
    return model.double().eval()


def images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def agree(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() <= 1e-12 * left.abs().max())


def test_torch_nn_utils_prune() -> None:
    model = Net().eval()
    prune.ln_structured(model.a, "weight", amount=3, n=2, dim=0)
    prune.ln_structured(model.b, "weight", amount=2, n=2, dim=1)
    with torch.no_grad():
        gone = model.a.weight.flatten(1).norm(dim=1) == 0
        for tensor in (model.a.bias, model.norm.weight, model.norm.bias):
            tensor[gone] = 0
    x = torch.randn(2, 3, 8, 8)
    model(x)  # its weights are results of autograd now, which deepcopy refuses
    packed = pack(model, x)
    assert isinstance(packed.a, PackedConv2d)
    assert packed.a.out_channels <= WIDTH - 3
    assert torch.allclose(packed(x), model(x), atol=1e-6)
    assert prune.is_pruned(model.a)


WAYS: dict[str, Callable[[nn.Module], object]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm, by a hook": weight_norm,
    "spectral norm, by a hook": spectral_norm,
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", amount=5),
}


@pytest.mark.parametrize("learns", [True, False], ids=["learns", "frozen"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings(
    "ignore:.*weight_norm.*:FutureWarning", "ignore:.*weights that are not 0:UserWarning"
)
def test_computed_weights_become_plain_weights(way: str, learns: bool) -> None:
    model = masked(Net())
    WAYS[way](model.b)
    expected = model.requires_grad_(learns).eval()(images())
    packed = pack(model, images())
    assert isinstance(packed.b, PackedConv2d)
    assert packed.a.out_channels == WIDTH - 3
    assert {parameter.requires_grad for parameter in packed.parameters()} == {learns}
    assert agree(expected, packed(images()))


def test_a_weight_learns_if_a_part_of_it_does() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    model[0].parametrizations.weight.original1.requires_grad_(False)  # the direction; the length learns
    assert plain_copy(model)[0].weight.requires_grad  # type: ignore[index]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_buffer_stays_a_buffer(dtype: torch.dtype) -> None:
    model = nn.BatchNorm2d(4)
    model.register_buffer("count", torch.arange(4, dtype=dtype))
    parametrize.register_parametrization(model, "count", Doubled())
    plain = plain_copy(model)
    assert torch.equal(dict(plain.named_buffers())["count"], 2 * torch.arange(4, dtype=dtype))
    assert {name for name, _ in plain.named_parameters()} == {"weight", "bias"}
    assert plain.state_dict().keys() == {"count", *nn.BatchNorm2d(4).state_dict()}
    assert parametrize.is_parametrized(model)  # the original is left alone


def learning(model: nn.Module) -> GroupWrapper:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"reg": 0.1, "total_steps": 10, "n_groups": 2, "temp": 0.5, "example_input": images()}
    return GroupWrapper(nn.DataParallel(model), optimizer, F.cross_entropy, **settings)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), learning])
def test_a_wrapped_model_is_unwrapped(wrap: Callable[[nn.Module], Any]) -> None:
    model = masked(Net())
    packed = pack(wrap(model), images())
    assert isinstance(packed, Net)
    assert agree(model(images()), packed(images()))


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (nn.Conv2d(3, 4, 3), DSPPruningError, r"a single Conv2d.*nn\.Sequential"),
        (nn.Sequential(nn.LazyConv2d(4, 3)), DSPShapeError, r"'0\.weight' has no shape yet"),
        (torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))), DSPTraceError, "scripted parts cannot be"),
        (3, DSPShapeError, "pack got a int"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_models_are_refused(model: nn.Module, error: type[DSPError], words: str) -> None:
    with pytest.raises(error, match=words):
        pack(model, torch.randn(1, 3, 8, 8))


class Borrows(Net):
    def head(self, y: Tensor) -> Tensor:
        return super().head(y) + self.b.weight.square().sum()


def test_a_layer_whose_weight_is_read_elsewhere_stays(tmp_path: Path) -> None:
    model = masked(Borrows())
    packed = pack(model, images())
    assert type(packed.b) is nn.Conv2d
    assert "also reads the parameters of" in str(packed.packing)
    assert agree(model(images()), packed(images()))
    dsp_kernels.save(packed, tmp_path / "net", images())  # without masks, which a file cannot hold
    assert agree(model(images()), dsp_kernels.load(tmp_path / "net")(images()))


class Writes(Net):
    def head(self, y: Tensor) -> Tensor:
        z = F.relu(self.b(y))
        z[:, :4] = y[:, 4:]
        return self.linear(z.mean((2, 3)))


def test_writing_into_a_part_of_a_tensor_is_refused() -> None:
    with pytest.raises(DSPTraceError, match="writes into a part of a tensor"):
        pack(masked(Writes()), images())


def test_networks_made_in_inference_mode_can_be_trained(tmp_path: Path) -> None:
    model = masked(Net())
    with torch.inference_mode():
        packed = pack(model, images())
        dense = unpack(packed)
        dsp_kernels.save(packed, tmp_path / "net", images())
        loaded = dsp_kernels.load(tmp_path / "net")
    for made in (packed, dense, loaded):
        made.train()(images()).sum().backward()
        assert all(parameter.grad is not None for parameter in made.parameters())


def test_unpack_keeps_the_dtype_of_layers_without_weights() -> None:
    model = masked(Net(), gone=tuple(range(WIDTH)))
    packed = pack(model, images())
    assert not any(weight.numel() for weight in packed.a.weights)
    dense = unpack(packed)
    assert {tensor.dtype for tensor in dense.state_dict().values() if tensor.is_floating_point()} == {
        torch.float64
    }
    assert agree(model(images()), dense(images()))


class Two(Net):
    """An image, features, and optional arguments; torch.fx alone takes ``mask is not None`` for true."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)

    def forward(self, x: Tensor, features: Tensor, mask: Tensor | None = None, raw: bool = False) -> Tensor:
        y = F.relu(self.norm(self.a(x)))
        if mask is not None:
            y = y * mask
        y = y * torch.sigmoid(self.embed(features))[:, :, None, None]
        return y if raw else self.head(y)


def two_inputs() -> tuple[Tensor, Tensor]:
    return images(), torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_several_inputs(tmp_path: Path) -> None:
    model, given = masked(Two()), two_inputs()
    packed = pack(model, given)
    assert packed.a.out_channels == packed.embed.out_features == WIDTH - 3
    assert agree(model(*given), packed(*given))
    dense = unpack(packed)
    assert dense.embed.weight.shape == (WIDTH, 5)
    assert agree(model(*given), dense(*given))

    dsp_kernels.save(packed, tmp_path / "net", given)
    loaded = dsp_kernels.load(tmp_path / "net")
    assert loaded.example_shapes == ((1, 3, 8, 8), (1, 5))
    assert torch.equal(loaded(*given), packed(*given))
    dsp_kernels.save(loaded, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "net").read_bytes()
    with pytest.raises(DSPFormatError, match="takes 2 inputs; pass"):
        dsp_kernels.save(packed, tmp_path / "other")
    with pytest.raises(DSPFormatError, match="takes 2 inputs, the example has 1"):
        dsp_kernels.save(packed, tmp_path / "other", given[0])
    with pytest.raises(DSPTraceError):
        dsp_kernels.fuse(packed, given[0])


def test_an_example_that_does_not_fit_names_the_layer() -> None:
    with pytest.raises(
        DSPTraceError, match=r"shape \(2, 2, 8, 8\) and dtype torch.float64, at 'a'"
    ) as caught:
        pack(masked(Net()), images(2))
    assert "tlparse" not in str(caught.value)


def test_an_example_with_more_than_the_model_takes_is_named() -> None:
    class Exactly(Two):
        def forward(self, x: Tensor, features: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x, features)

    image, features = two_inputs()
    with pytest.raises(
        DSPShapeError, match=r"Exactly.forward\(\) takes 2 inputs; input 3 .* \(2, 5\), has no"
    ):
        pack(masked(Exactly()), (image, features, features))
    with pytest.raises(DSPShapeError, match=r"input 2 of the example, of shape \(2, 5\), has no place"):
        pack(masked(Net()), (image, features))
    with pytest.raises(DSPShapeError, match="input 2 of the example is a float"):
        pack(masked(Two()), (image, 1.0))  # type: ignore[arg-type]


def test_an_example_on_another_device_is_refused() -> None:
    with pytest.raises(DSPShapeError, match="the example is on meta; expected cpu"):
        pack(masked(Net()), images().to("meta"))


@pytest.mark.parametrize("second_order", ["exact", "original", "none"])
def test_learn_prune_and_pack_with_several_inputs(second_order: str) -> None:
    class Deep(Two):
        def __init__(self) -> None:
            super().__init__()
            self.c = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

        def forward(self, x: Tensor, features: Tensor) -> Tensor:
            y = F.relu(self.norm(self.a(x))) * torch.sigmoid(self.embed(features))[:, :, None, None]
            return self.head(F.relu(self.c(y)))

    torch.manual_seed(0)
    model, given = Deep().double(), two_inputs()
    target = torch.zeros_like(model(*given))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    settings = {"example_input": given, "second_order": second_order}
    wrapper = GroupWrapper(model, optimizer, F.mse_loss, 1e-2, 2, 2, 1.0, **settings)  # type: ignore[arg-type]
    for _ in range(2):
        wrapper.initialize()
        optimizer.zero_grad()
        F.mse_loss(wrapper(*given), target).backward()
        optimizer.step()
        before = {name: p.clone() for name, p in model.named_parameters() if name.endswith(".group")}
        wrapper.after_step(given, target)
        assert before
        assert not any(torch.equal(model.get_parameter(name), logits) for name, logits in before.items())
    pruner = PruneWrapper(model, 2, 1, example_input=given)
    assert pruner.initialize(0.4)[0] >= 40
    packed = pack(pruner, given).eval()
    assert agree(model.eval()(*given), packed(*given))
    with pytest.raises(DSPShapeError, match="input 2 of the example is a int"):
        PruneWrapper(model, 2, 1, example_input=(given[0], 5))  # type: ignore[arg-type]
    with pytest.raises(DSPShapeError, match="or a tuple of all inputs"):
        PruneWrapper(model, 2, 1)


def test_weights_that_are_nan_are_named() -> None:
    model = masked(Net())
    with torch.no_grad():
        model.linear.weight[0] = float("nan")
    with pytest.raises(
        DSPVerificationError, match=r"itself answers the example .*'linear\.weight' is not finite"
    ):
        pack(model, images())


def test_integer_images_are_an_example() -> None:
    model, image = masked(Net()), torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert len(PruneWrapper(model, 2, 1, example_input=image).layers) == 1
