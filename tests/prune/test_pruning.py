"""PruneWrapper: what is pruned at a rate or a beta, and what stays pruned in training."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import ToyA
from pruner_cases import fresh, learned, same, state_of, train, zeros
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.prune.wrapper import PruneWrapper


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("fp", [{"fp_every_nth_conv": 2}, {"fp_layer_indices": []}], ids=["filters", "none"])
def test_the_result_is_the_nearest_at_or_above_the_rate(rate: float, fp: dict[str, Any]) -> None:
    pruner = learned(fresh(), **fp)
    flops, _ = pruner.initialize(rate)
    assert flops >= 100 * rate
    assert pruner.beta is not None
    others = [pruner.prune_at(beta)[0] for beta in torch.linspace(0, min(1.0, 2 * pruner.beta), 20).tolist()]
    assert all(other < 100 * rate or other >= flops for other in others)
    assert rate == 0 or min(others) < 100 * rate


@pytest.mark.parametrize("target", ["macs", "params"])
def test_the_target_is_reached_in_its_own_measure(target: str) -> None:
    pruner = learned(fresh(), target=target)
    reached = dict(zip(("macs", "params"), pruner.initialize(0.6), strict=True))
    assert 60 <= reached[target] < 60.5


def test_percentages_count_nonzero_weights() -> None:
    pruner = learned(fresh())
    flops, params = pruner.initialize(0.6)
    kept_macs = kept_params = all_macs = all_params = 0
    for layer in pruner.layers:
        alive = int((~zeros(pruner)[layer.name]).sum())
        area = layer.output_hw[0] * layer.output_hw[1]
        kept_macs, all_macs = kept_macs + 9 * alive * area, all_macs + layer.conv.weight.numel() * area
        kept_params, all_params = kept_params + 9 * alive, all_params + layer.conv.weight.numel()
    assert flops == pytest.approx(100 * (1 - kept_macs / all_macs), abs=1e-9)
    assert params == pytest.approx(100 * (1 - kept_params / all_params), abs=1e-9)
    summary = pruner.summary()
    assert (summary["pruned_flops"], summary["pruned_params"]) == (flops, params)
    assert sum(row["macs_kept"] for row in summary["layers"]) == kept_macs
    assert sum(row["macs"] for row in summary["layers"]) == all_macs


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, float("nan"), "half", None])
def test_an_invalid_rate_leaves_the_model_unchanged(rate: Any) -> None:
    pruner = learned(fresh())
    before = state_of(pruner.model)
    with pytest.raises(DSPPruningError, match=r"pruning rate"):
        pruner.initialize(rate)
    assert same(state_of(pruner.model), before)


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan"), "x"])
def test_an_invalid_beta(beta: Any) -> None:
    with pytest.raises(DSPPruningError, match="beta"):
        learned(fresh()).prune_at(beta)


def test_an_unreachable_rate_names_the_range_and_leaves_the_model_unchanged() -> None:
    pruner = learned(fresh(), fp_layer_indices=-1)
    pruner.initialize(0.3)
    before = state_of(pruner.model)
    with pytest.raises(DSPPruningError, match=r"0\.9999.*within reach: 0 to 0\.\d+") as error:
        pruner.initialize(0.9999)
    assert same(state_of(pruner.model), before)
    reachable = float(str(error.value).rsplit(" ", 1)[1])
    assert 100 * reachable <= pruner.initialize(reachable)[0] < 99.99


def test_the_output_always_depends_on_the_input() -> None:
    pruner = learned(ToyA(), fp_layer_indices=[0, 1, 2])
    x = torch.randn(2, 3, 32, 32)
    for rate in (0.9, 0.98, 0.995):
        pruner.initialize(min(rate, pruner.reachable()[1]))
        output = pruner.model.eval()(x)
        assert not torch.equal(output[0], output[1])


def test_prune_at_starts_from_the_state_before() -> None:
    pruner = learned(fresh())
    before = state_of(pruner.model)
    first = pruner.prune_at(0.1)
    pruned = state_of(pruner.model)
    assert pruner.prune_at(0.4) > first
    assert pruner.prune_at(0.1) == first
    assert same(state_of(pruner.model), pruned)
    assert pruner.prune_at(0.0) == (0, 0)
    assert same(state_of(pruner.model), before)


def test_weights_loaded_after_a_pruning_are_not_overwritten() -> None:
    pruner = learned(fresh())
    pruner.prune_at(0.3)
    other = learned(fresh(7)).model.state_dict()
    pruner.model.load_state_dict(other)
    pruner.prune_at(0.0)
    assert same(state_of(pruner.model), other)


def test_training_keeps_what_is_pruned_at_zero() -> None:
    pruner = learned(fresh())
    flops, params = pruner.initialize(0.7)
    before, masks = zeros(pruner), {layer.name: layer.conv.mask.clone() for layer in pruner.layers}
    norms = {
        name: (module.weight == 0) & (module.bias == 0)
        for name, module in pruner.model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    assert sum(int(cleared.sum()) for cleared in norms.values()) > 0
    live = pruner.model.get_submodule("stage_1.0.conv_a").weight.detach().clone()
    train(pruner)
    assert all(torch.equal(gone, zeros(pruner)[name]) for name, gone in before.items())
    for name, cleared in norms.items():
        norm = pruner.model.get_submodule(name)
        assert torch.equal((norm.weight == 0) & (norm.bias == 0), cleared), name
    assert not torch.equal(pruner.model.get_submodule("stage_1.0.conv_a").weight, live)
    assert all(torch.equal(layer.conv.mask, masks[layer.name]) for layer in pruner.layers)
    assert (pruner.report().pruned_flops, pruner.report().pruned_params) == (flops, params)


def test_a_pruned_filter_leaves_no_constant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()
    )
    pruner = learned(model, 2, fp_layer_indices=[0, 1])
    pruner.prune_at(0.4)
    x = torch.randn(2, 3, 32, 32)
    gone = [~layer.conv.mask[:, :, 0, 0].any(1) for layer in pruner.layers]
    assert gone[0].any()
    assert gone[1].any()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    pruner.after_step()
    inner = model[:4].eval()(x)
    assert bool((inner[:, gone[0]] == 0).all())
    assert bool((model(x)[:, gone[1]] == 0).all())
    assert bool((inner[:, ~gone[0]] != 0).flatten(2).any(2).any(0).all())


def test_batch_norm_statistics_and_modes_never_change() -> None:
    pruner = learned(fresh())
    pruner.initialize(0.3)
    train(pruner)
    statistics = {n: v for n, v in state_of(pruner.model).items() if "running" in n or "tracked" in n}
    modes = [module.training for module in pruner.model.modules()]
    pruner.initialize(0.5)
    pruner.after_step()
    pruner.summary()
    now = pruner.model.state_dict()
    assert all(torch.equal(now[name], value) for name, value in statistics.items())
    assert modes == [module.training for module in pruner.model.modules()]


def test_pruning_again_starts_from_the_current_weights() -> None:
    pruner = learned(fresh())
    pruner.initialize(0.3)
    train(pruner)
    gone, trained = zeros(pruner), state_of(pruner.model)
    flops, _ = pruner.initialize(0.6)
    assert flops >= 60
    for layer in pruner.layers:
        now = zeros(pruner)[layer.name]
        assert not (gone[layer.name] & ~now).any()
        kept = ~now[:, :, None, None]
        assert torch.equal(layer.conv.weight * kept, trained[f"{layer.name}.weight"] * kept)
    train(pruner)
    assert pruner.initialize(0.0)[0] >= flops  # what is pruned stays pruned


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
    with pytest.raises(DSPPruningError, match="cycle 5 of 5"):
        pruner.initialize(0.7, 5, 5)


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_masked_weights_count_as_zero(beta: float) -> None:
    pruner, clean = learned(fresh()), learned(fresh())
    for each in (pruner, clean):
        each.initialize(0.3)
        train(each)
    with torch.no_grad():
        for layer in pruner.layers:
            layer.conv.weight.masked_fill_(layer.conv.mask == 0, 100.0)
    assert pruner.prune_at(beta) == clean.prune_at(beta)
    assert same(state_of(pruner.model), state_of(clean.model))


class Twice(nn.Module):
    """A conv and a batch norm that are called twice, the second time behind another conv."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1, bias=False)
        self.first = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm_first = nn.BatchNorm2d(6)
        self.again = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.norm(self.again(x)) + self.norm(self.again(F.relu(self.norm_first(self.first(x)))))


def test_a_layer_that_is_called_twice_keeps_what_either_call_needs() -> None:
    torch.manual_seed(0)
    pruner = learned(Twice(), 1, fp_layer_indices=[0], layers=lambda name, _: name in ("first", "again"))
    first, again = (layer.conv for layer in pruner.layers)
    with torch.no_grad():
        first.weight[2] = 0  # channel 2 is dead for the second call of ``again``, alive for the first
        again.weight[4] = 0
    bias = pruner.model.norm.bias.detach().clone()
    pruner.prune_at(0.0)
    assert not first.mask[2].any()
    assert pruner.model.norm_first.bias[2] == 0
    assert again.mask[:, 2].flatten().tolist() == [1, 1, 1, 1, 0, 1]
    assert torch.equal(pruner.model.norm.bias, bias)


def channels_per_group(pruner: PruneWrapper) -> list[list[int]]:
    found = []
    for layer in pruner.layers:
        alive = ~zeros(pruner)[layer.name]
        groups = layer.conv.group.argmax(0)
        found.append([int(alive[groups == g].any(0).sum()) for g in groups.unique()])
    return found


def energy(pruner: PruneWrapper) -> float:
    return sum(float(layer.conv.weight.detach().double().square().sum()) for layer in pruner.layers)


@pytest.mark.parametrize("multiple", [4, 8])
def test_every_group_keeps_a_multiple_of_channels(multiple: int) -> None:
    pruner = learned(fresh(), channel_multiple=multiple)
    whole = energy(pruner)
    flops, _ = pruner.initialize(0.5)
    assert flops >= 50
    assert all(size % multiple == 0 for sizes in channels_per_group(pruner) for size in sizes)
    plain = learned(fresh())
    plain.initialize(flops / 100)
    assert any(size % multiple for sizes in channels_per_group(plain) for size in sizes)
    report = pruner.report()
    assert report.rounding is not None
    assert report.rounding.exceptions == 0
    assert report.rounding.energy == pytest.approx(1 - energy(pruner) / whole)
    assert report.rounding.unrounded_energy == pytest.approx(1 - energy(plain) / whole)
    assert f"multiples of {multiple} channels" in str(report)
    assert [row["group_channels"] for row in report.layers] == channels_per_group(pruner)


def test_groups_with_too_few_channels_are_counted_as_exceptions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
    pruner = learned(model, 2, fp_layer_indices=[], channel_multiple=8)
    pruner.prune_at(0.1)
    assert channels_per_group(pruner)[0] == [6, 6]  # fewer than one multiple to choose from: all stay
    rounding = pruner.report().rounding
    assert rounding is not None
    assert rounding.exceptions == 2


def test_pruning_filters_only() -> None:
    pruner = learned(fresh(), 1, fp_every_nth_conv=1, prune_channels=False)
    assert pruner.initialize(0.5)[0] >= 50
    kept = {layer.name: ~zeros(pruner)[layer.name] for layer in pruner.layers}
    for stage in ("stage_1.0", "stage_2.0", "stage_3.0"):
        first, second = kept[f"{stage}.conv_a"], kept[f"{stage}.conv_b"]
        assert torch.equal(first, first.any(1)[:, None].expand_as(first))
        # The second conv reads exactly what the first one writes.
        assert torch.equal(second, second.any(1)[:, None] & first.any(1)[None])


class Odd(nn.Module):
    """Rectangular kernels, strides and images, five input channels, convs with bias, no batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(5, 8, (3, 5), padding=(1, 2))
        self.wide = nn.Conv2d(8, 12, (1, 7), stride=(1, 2), padding=(0, 3))
        self.tall = nn.Conv2d(12, 10, (5, 1), dilation=(2, 1), padding=(4, 0))
        self.last = nn.Conv2d(10, 6, 3, stride=(2, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.stem(x))))
        return self.last(torch.relu(self.tall(x))).mean((2, 3))


def test_a_network_with_rectangular_kernels_and_images() -> None:
    torch.manual_seed(0)
    example = torch.randn(1, 5, 20, 33)
    pruner = learned(Odd(), 2, fp_every_nth_conv=-1, fp_layer_indices=[0, 1], example_input=example)
    flops, params = pruner.initialize(0.5)
    sizes = {"wide": 12 * 8 * 7 * 20 * 17, "tall": 10 * 12 * 5 * 20 * 17, "last": 6 * 10 * 9 * 9 * 15}
    kept = sum(sizes[layer.name] * float(layer.conv.mask.mean()) for layer in pruner.layers)
    assert flops == pytest.approx(100 * (1 - kept / sum(sizes.values())), abs=1e-4)
    assert 50 <= flops < 55
    assert params == pruner.report().pruned_params
    gone = ~pruner.model.wide.mask[:, :, 0, 0].bool().any(1)
    assert gone.any()
    assert not pruner.model.tall.mask[:, gone].any()
