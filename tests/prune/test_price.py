"""Pruning by price: thresholds per layer, against brute force on tiny networks with planted costs."""

import itertools
import math
from typing import Any

import pytest
import torch
from pruner_cases import fresh, learned
from torch import nn

from dsp_kernels.errors import DSPPruningError, DSPTraceError
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.times.model import macs
from dsp_pruning.prune.price import PriceSearch
from dsp_pruning.prune.rule import candidate_betas
from dsp_pruning.prune.wrapper import PruneWrapper


def in_vectors(spec: ConvSpec, input_hw: tuple[int, int]) -> float:
    """Channels cost in fours, and a call costs as much as 3 filters of them."""
    groups = spec.structure.groups
    return sum(
        math.ceil(len(group.in_index) / 4) * (len(group.out_index) + 3) * input_hw[0] for group in groups
    )


def tiny(seed: int = 0, **settings: Any) -> PruneWrapper:
    torch.manual_seed(seed)
    convs = [nn.Conv2d(3, 12, 3), nn.Conv2d(12, 12, 3), nn.MaxPool2d(2), nn.Conv2d(12, 12, 3)]
    settings = {"fp_layer_indices": [], "price": in_vectors} | settings
    return PruneWrapper(nn.Sequential(*convs), 1, target="time", **settings)


def chosen(pruner: PruneWrapper, rate: float) -> tuple[PriceSearch, Any]:
    search = pruner._search()
    assert isinstance(search, PriceSearch)
    return search, search.chosen(rate)[0]


@pytest.mark.parametrize("seed", range(3))
def test_no_thresholds_lose_much_less_for_the_same_saving(seed: int) -> None:
    pruner = tiny(seed)
    search: PriceSearch = pruner._search()
    names = [rule.name for rule in search.search.rules]
    every = itertools.product(*(candidate_betas([rule.channels]) for rule in search.search.rules))
    states = [dict(zip(((name, "channels") for name in names), betas, strict=True)) for betas in every]
    masks = [search.masks(state)[0] for state in states]
    all_points = [(search.pruned(one), search.lost(one)) for one in masks]
    for rate in (0.3, 0.5, 0.6):
        found = search.masks(search.best(rate))[0]
        saved, lost = search.pruned(found), search.lost(found)
        assert saved >= rate
        # At what it saves, to the rounding of sums, nothing is better.
        assert lost <= 1.05 * min(other for share, other in all_points if share >= saved - 1e-9)


def test_a_channel_that_saves_nothing_stays() -> None:
    pruner = tiny()
    for rate in (0.2, 0.4, 0.6):
        _, masks = chosen(pruner, rate)
        assert all(int(mask.any(0).sum()) % 4 == 0 for mask in masks.values())


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("fp", [[], [0, 2]], ids=["channels", "filters"])
def test_rates_are_met_in_the_price(rate: float, fp: list[int]) -> None:
    pruner = learned(fresh(), target="time", price=macs, fp_layer_indices=fp)
    flops, _ = pruner.initialize(rate)
    assert 100 * rate <= flops + 1e-9 < 100 * rate + 8
    assert pruner.beta is None
    pruner.after_step()
    assert pruner.preview(rate).pruned_flops == pytest.approx(flops)
    assert pruner.initialize(rate)[0] == pytest.approx(flops)  # the last pruning is undone


def test_it_keeps_at_least_the_energy_of_one_threshold_for_all() -> None:
    by_price = learned(fresh(), target="time", price=macs, fp_every_nth_conv=2)
    one_beta = learned(fresh(), fp_every_nth_conv=2)
    search = by_price._search()
    one_beta.initialize(0.6)
    masks = {layer.name: layer.conv.get_buffer("mask")[:, :, 0, 0] != 0 for layer in one_beta.layers}
    assert search.lost(search.masks(search.best(0.6))[0]) < search.lost(masks)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(DSPPruningError, match="within reach"):
        tiny().initialize(0.99)
    with pytest.raises(DSPPruningError, match="target is 'macs'"):
        learned(fresh(), price=macs)
    with pytest.raises(DSPPruningError, match="finds its own steps"):
        tiny(channel_multiple=4)
    low, high = tiny().reachable()
    assert low == 0
    assert tiny().initialize(high - 1e-6)[0] > 0

    class Branching(nn.Sequential):
        def forward(self, x: Any) -> Any:
            return super().forward(x) if x.sum() > -1 else x

    model = Branching(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))
    pruner = PruneWrapper(model, 1, -1, target="time", price=macs)
    with pytest.raises(DSPTraceError, match="by time"):
        pruner.initialize(0.3)
