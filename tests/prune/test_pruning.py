"""PruneWrapper: what it promises about rates and about training after the pruning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pruner_cases import fresh, learned, same, state_of, train, zeros
from torch import Tensor, nn
from toy_net import ToyA

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.models import cifar_resnet
from dsp_pruning.prune.rule import candidate_betas
from dsp_pruning.prune.wrapper import PruneWrapper


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 0.73, 0.9])
@pytest.mark.parametrize("fp", [{"fp_every_nth_conv": 2}, {"fp_layer_indices": []}], ids=["filters", "none"])
def test_the_result_is_the_nearest_at_or_above_the_rate(rate: float, fp: dict[str, Any]) -> None:
    pruner = learned(fresh(), **fp)
    flops, _ = pruner.initialize(rate)
    assert flops >= 100 * rate
    rules = pruner._rules()
    betas = candidate_betas(shares for rule in rules for shares in rule.shares)
    others = {pruner.prune_at(beta)[0] for beta in betas[:: max(1, len(betas) // 60)]}
    assert all(other < 100 * rate or other >= flops for other in others)


def test_percentages_count_what_the_weights_hold() -> None:
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


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, 50, float("nan"), float("inf"), "half", None])
def test_a_rate_that_cannot_be_is_refused(rate: Any) -> None:
    pruner = learned(fresh())
    before = state_of(pruner.model)
    with pytest.raises(DSPPruningError, match=r"pruning rate"):
        pruner.initialize(rate)
    assert same(state_of(pruner.model), before)


def test_an_unreachable_rate_names_the_range_and_leaves_the_model_alone() -> None:
    pruner = learned(fresh(), fp_layer_indices=-1)
    pruner.initialize(0.3)
    before = state_of(pruner.model)
    with pytest.raises(DSPPruningError, match=r"0\.9999.*within reach: 0 to 0\.\d+") as error:
        pruner.initialize(0.9999)
    assert same(state_of(pruner.model), before)
    reachable = float(str(error.value).rsplit(" ", 1)[1])
    assert 100 * reachable <= pruner.initialize(reachable)[0] < 99.99


def test_a_chain_is_never_cut_in_two() -> None:
    pruner = learned(ToyA(), fp_layer_indices=[0, 1, 2])
    x = torch.randn(2, 3, 32, 32)
    for rate in (0.9, 0.95, 0.98, 0.99, 0.995):
        try:
            pruner.initialize(rate)
        except DSPPruningError as error:
            highest = float(str(error).rsplit(" ", 1)[1])
            pruner.initialize(highest)
        output = pruner.model.eval()(x)
        assert not torch.equal(output[0], output[1]), "the output no longer depends on the input"


@pytest.mark.parametrize("beta", [-0.1, 1.1, float("nan"), "x"])
def test_a_beta_that_cannot_be_is_refused(beta: Any) -> None:
    with pytest.raises(DSPPruningError, match="beta"):
        learned(fresh()).prune_at(beta)


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
    summary = pruner.summary()
    assert (summary["pruned_flops"], summary["pruned_params"]) == (flops, params)


def test_a_filter_that_is_gone_leaves_no_constant() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU()
    )
    pruner = learned(model, 2, fp_layer_indices=[0, 1])
    pruner.prune_at(0.4)
    train_input = torch.randn(2, 3, 32, 32)
    gone = ~pruner.layers[0].conv.mask[:, :, 0, 0].any(1), ~pruner.layers[1].conv.mask[:, :, 0, 0].any(1)
    assert gone[0].any()
    assert gone[1].any()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    pruner.after_step()
    inner = model[:4].eval()(train_input)
    assert bool((inner[:, gone[0]] == 0).all())
    assert bool((model(train_input)[:, gone[1]] == 0).all())
    assert bool((inner[:, ~gone[0]] != 0).flatten(2).any(2).any(0).all())


def test_batch_norm_statistics_are_never_touched() -> None:
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


def test_cyclic_pruning_goes_on_from_the_present_weights() -> None:
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


@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_what_a_mask_hides_counts_for_nothing(beta: float) -> None:
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
    """One conv and one BN that run twice; the second time they read what the first conv made."""

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


def test_a_layer_that_runs_twice_keeps_what_either_run_needs() -> None:
    torch.manual_seed(0)
    pruner = learned(Twice(), 1, fp_layer_indices=[0], layers=lambda name, _: name in ("first", "again"))
    first, again = (layer.conv for layer in pruner.layers)
    with torch.no_grad():
        first.weight[2] = (
            0  # its filter 2 is gone: the second run reads a dead channel 2, the first run does not
        )
        again.weight[4] = 0
    bias = pruner.model.norm.bias.detach().clone()
    pruner.prune_at(0.0)
    assert not first.mask[2].any()
    assert pruner.model.norm_first.bias[2] == 0
    assert again.mask[:, 2].flatten().tolist() == [1, 1, 1, 1, 0, 1]
    assert torch.equal(pruner.model.norm.bias, bias)


def test_after_step_needs_something_pruned() -> None:
    pruner = PruneWrapper(cifar_resnet(8), 2, -1)
    with pytest.raises(DSPPruningError, match=r"call initialize\(rate\) first"):
        pruner.after_step()
    pruner.initialize(0.3)
    masked = pruner.model.state_dict()
    fresh = PruneWrapper(cifar_resnet(8), 2, -1)
    fresh.model.load_state_dict(masked)
    fresh.after_step()  # goes on with the loaded masks
