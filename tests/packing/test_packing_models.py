"""pack on wrapped models, computed weights and unusual model code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm

import dsp_kernels
from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPError, DSPPruningError, DSPShapeError, DSPTraceError
from dsp_pruning import GroupWrapper, pack
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


@pytest.mark.parametrize(
    "reparametrise", [weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm]
)
@pytest.mark.filterwarnings(
    "ignore:.*weight_norm.*:FutureWarning", "ignore:.*weights that are not 0:UserWarning"
)
def test_computed_weights_become_plain_weights(reparametrise: Callable[[nn.Module], nn.Module]) -> None:
    model = masked(Net())
    reparametrise(model.b)
    model.eval()
    model(images())
    packed = pack(model, images())
    assert isinstance(packed.b, PackedConv2d)
    assert packed.a.out_channels == WIDTH - 3
    assert agree(model(images()), packed(images()))


def learning(model: nn.Module) -> GroupWrapper:
    """A learner of a model that is wrapped itself."""
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
        (torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3))), DSPTraceError, "ScriptModule"),
        (3, DSPShapeError, "pack got a int"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_models_are_refused(model: nn.Module, error: type[DSPError], words: str) -> None:
    with pytest.raises(error, match=words):
        pack(model, torch.randn(1, 3, 8, 8))


class Borrows(Net):
    """Code that reads the weight of a layer that it also calls."""

    def head(self, y: Tensor) -> Tensor:
        return super().head(y) + self.b.weight.square().sum()


def test_a_layer_whose_weight_is_read_elsewhere_stays() -> None:
    model = masked(Borrows())
    packed = pack(model, images())
    assert type(packed.b) is nn.Conv2d
    assert "also reads the parameters of" in str(packed.packing)
    assert agree(model(images()), packed(images()))


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
