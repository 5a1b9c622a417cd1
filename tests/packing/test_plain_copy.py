"""A copy with ordinary weights: each of the kind that it was computed from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from dsp_pruning.packing.pack import plain_copy

WAYS: dict[str, Callable[[nn.Module], object]] = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "weight norm, by a hook": weight_norm,
    "spectral norm, by a hook": spectral_norm,
    "pruned": lambda conv: prune.l1_unstructured(conv, "weight", amount=5),
}


class Doubled(nn.Module):
    """Twice what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("learns", [True, False], ids=["learns", "frozen"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_frozen_weight_stays_frozen(way: str, learns: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    WAYS[way](model[0])
    for parameter in model.parameters():
        parameter.requires_grad_(learns)
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    plain = plain_copy(model)
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == {
        "0.weight": learns,
        "0.bias": learns,
    }
    assert not list(plain.buffers())
    torch.testing.assert_close(plain(x), expected)


def test_one_part_that_learns_is_enough() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)))
    model[0].parametrizations.weight.original1.requires_grad_(False)  # the direction; the length learns
    assert plain_copy(model)[0].weight.requires_grad  # type: ignore[index]


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
