"""PruneWrapper: targets, multiples of channels, cycles, what it tells before and after, unusual networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pruner_cases import fresh, learned, same, state_of, train, zeros
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.prune.wrapper import PruneWrapper


@pytest.mark.parametrize("target", ["macs", "params"])
def test_the_target_is_met_in_its_own_measure(target: str) -> None:
    pruner, rate = learned(fresh(), target=target), 0.6
    reached = dict(zip(("macs", "params"), pruner.initialize(rate), strict=True))
    assert 100 * rate <= reached[target] < 100 * rate + 0.5


def test_the_two_targets_choose_different_thresholds() -> None:
    # The early layers hold few of the weights and many of the MACs, so give them more to lose.
    betas = []
    for target in ("macs", "params"):
        pruner = learned(fresh(), target=target)
        with torch.no_grad():
            pruner.model.stage_1[0].conv_a.weight[:, ::2] *= 1e-3
            pruner.model.stage_1[0].conv_b.weight[:, ::2] *= 1e-3
        pruner.initialize(0.4)
        betas.append(pruner.beta)
    assert betas[0] < betas[1]


def _columns(pruner: PruneWrapper) -> list[list[int]]:
    """Live channels of every group, read off the weights."""
    found = []
    for layer in pruner.layers:
        alive = ~zeros(pruner)[layer.name]
        groups = layer.conv.group.argmax(0)
        found.append([int(alive[groups == g].any(0).sum()) for g in groups.unique()])
    return found


def _energy(pruner: PruneWrapper) -> float:
    return sum(float(layer.conv.weight.detach().double().square().sum()) for layer in pruner.layers)


@pytest.mark.parametrize("multiple", [4, 8])
def test_every_group_keeps_a_multiple_of_channels(multiple: int) -> None:
    pruner = learned(fresh(), channel_multiple=multiple)
    flops, _ = pruner.initialize(0.5)
    assert flops >= 50
    assert all(size % multiple == 0 for sizes in _columns(pruner) for size in sizes)
    plain = learned(fresh())
    plain.initialize(0.5)
    assert any(size % multiple for sizes in _columns(plain) for size in sizes)
    report = pruner.report()
    assert report.rounding is not None
    assert report.rounding.exceptions == 0
    whole = _energy(learned(fresh()))
    assert report.rounding.energy == pytest.approx(1 - _energy(pruner) / whole)
    plain.initialize(flops / 100)
    assert report.rounding.unrounded_energy == pytest.approx(1 - _energy(plain) / whole)
    assert f"multiples of {multiple} channels" in str(report)
    assert [row["group_channels"] for row in report.layers] == _columns(pruner)


def test_groups_with_too_few_channels_are_counted_as_exceptions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    pruner = learned(model, 2, fp_layer_indices=[], channel_multiple=8)
    pruner.prune_at(0.1)
    assert _columns(pruner)[0] == [6, 6]  # less than one multiple to choose from: all stay
    rounding = pruner.report().rounding
    assert rounding is not None
    assert rounding.exceptions == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target": "flops"}, "target is 'flops'"),
        ({"channel_multiple": 0}, "channel_multiple is 0"),
        ({"channel_multiple": 2.0}, r"channel_multiple is 2\.0"),
        ({"channel_multiple": 8, "prune_channels": False}, "prune_channels is False"),
    ],
)
def test_targets_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DSPPruningError, match=message):
        PruneWrapper(fresh(), 2, 2, **settings)


def test_cycles_prune_a_little_more_each_time() -> None:
    pruner = learned(fresh())
    gone = {name: torch.zeros_like(value) for name, value in zeros(pruner).items()}
    for cycle in range(5):
        flops, _ = pruner.initialize(0.7, cycle, 5)
        assert 14 * (cycle + 1) <= flops < 14 * (cycle + 1) + 2
        now = zeros(pruner)
        assert all(not (gone[name] & ~now[name]).any() for name in now)
        gone = now
        train(pruner)
    assert flops >= 70
    with pytest.raises(DSPPruningError, match="cycle 5 of 5"):
        pruner.initialize(0.7, 5, 5)


def test_only_filters_are_pruned_where_channels_are_not() -> None:
    pruner = learned(fresh(), 1, fp_every_nth_conv=1, prune_channels=False)
    flops, _ = pruner.initialize(0.5)
    assert flops >= 50
    kept = {layer.name: ~zeros(pruner)[layer.name] for layer in pruner.layers}
    for stage in ("stage_1.0", "stage_2.0", "stage_3.0"):
        first, second = kept[f"{stage}.conv_a"], kept[f"{stage}.conv_b"]
        assert torch.equal(first, first.any(1)[:, None].expand_as(first))
        # What the second conv reads is what the first one writes, no less.
        assert torch.equal(second, second.any(1)[:, None] & first.any(1)[None])


def test_a_preview_changes_nothing_and_is_right() -> None:
    pruner = learned(fresh(), channel_multiple=4)
    before = state_of(pruner.model)
    low, high = pruner.reachable()
    expected = pruner.preview(0.6)
    assert same(state_of(pruner.model), before)
    with pytest.raises(DSPPruningError, match="call initialize"):
        pruner.after_step()  # nothing is pruned yet
    assert low == 0
    assert pruner.initialize(0.6) == (expected.pruned_flops, expected.pruned_params)
    assert pruner.report() == expected
    assert pruner.initialize(high)[0] == pytest.approx(100 * high)
    train(pruner)
    assert pruner.reachable()[0] == pytest.approx(high)  # what is pruned stays pruned
    with pytest.raises(DSPPruningError, match="out of reach"):
        learned(fresh()).preview(0.99999)


def test_the_report_names_every_layer_with_what_it_keeps() -> None:
    pruner = learned(fresh())
    flops, _ = pruner.initialize(0.5)
    lines = str(pruner.report()).splitlines()
    assert lines[0].startswith(f"{flops:.2f} % of the FLOPs")
    for layer in pruner.layers:
        mask = layer.conv.mask[:, :, 0, 0] != 0
        line = next(line for line in lines if line.startswith(layer.name))
        assert f" {int(mask.sum())}/{mask.numel()} " in line
        assert f" {int(mask.any(1).sum())}/{mask.shape[0]} " in line
        assert ("(f)" in line) == (layer.name in pruner.filter_layers)


class Odd(nn.Module):
    """Rectangular kernels, strides and maps, five input channels, convs with bias, no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(5, 8, (3, 5), padding=(1, 2))
        self.wide = nn.Conv2d(8, 12, (1, 7), stride=(1, 2), padding=(0, 3))
        self.tall = nn.Conv2d(12, 10, (5, 1), dilation=(2, 1), padding=(4, 0))
        self.last = nn.Conv2d(10, 6, 3, stride=(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        return self.last(torch.relu(self.tall(x))).mean((2, 3))


def test_a_network_that_is_neither_square_nor_rgb_nor_without_bias() -> None:
    torch.manual_seed(0)
    example = torch.randn(1, 5, 20, 33)
    pruner = learned(Odd(), 2, fp_every_nth_conv=-1, fp_layer_indices=[0, 1], example_input=example)
    flops, params = pruner.initialize(0.5)
    sizes = {"wide": 12 * 8 * 7 * 20 * 17, "tall": 10 * 12 * 5 * 20 * 17, "last": 6 * 10 * 9 * 9 * 15}
    masks = {layer.name: layer.conv.mask.mean() for layer in pruner.layers}
    kept = sum(size * float(masks[name]) for name, size in sizes.items())
    assert flops == pytest.approx(100 * (1 - kept / sum(sizes.values())), abs=1e-4)
    assert 50 <= flops < 55
    gone = ~pruner.model.wide.mask[:, :, 0, 0].bool().any(1)
    assert gone.any()
    with torch.no_grad():
        for parameter in pruner.model.parameters():
            parameter.add_(1.0)
    pruner.after_step()
    made = pruner.model.wide(torch.relu(pruner.model.stem(example)))
    assert bool((made[:, gone] == 0).all())
    assert not pruner.model.tall.mask[:, gone].any()
    assert params == pruner.report().pruned_params
