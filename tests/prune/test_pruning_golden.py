"""Masks and pruned shares against the original's, at every threshold of its bisection (golden README 5)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toy_net import ToyA

from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.prune.rule import (
    channel_shares,
    count_below,
    filter_mask,
    filter_shares,
    group_channel_masks,
    hard_groups,
    kernel_energy,
)
from dsp_pruning.prune.wrapper import PruneWrapper

STEPS = [*(f"iter{i}" for i in range(10)), "final"]
RATES = ("0.3", "0.5", "0.7")
# pflops and pparams of the files: float32 percentages of at most 100
PERCENT = 1e-4


def load(shared: Path, net: str, rate: str) -> tuple[PruneWrapper, Any, dict[str, Any]]:
    golden = np.load(shared / "golden" / f"prune_{net}_{rate}.npz")
    initial = np.load(shared / "golden" / f"prune_{net}_0.3.npz")
    meta = json.loads(str(golden["meta"]))
    model: nn.Module = ToyA() if net == "toyA" else cifar_resnet(20)
    pruner = PruneWrapper(model, meta["n_groups"], **meta["fp"])
    state = {key[5:]: torch.from_numpy(initial[key]) for key in initial if key.startswith("init/")}
    logits = {
        f"{key[7:]}.group": torch.from_numpy(initial[key]) for key in initial if key.startswith("logits/")
    }
    wrong = model.load_state_dict(state | logits, strict=False)
    assert not wrong.unexpected_keys
    assert all(key.endswith(".mask") for key in wrong.missing_keys)
    assert [layer.name for layer in pruner.layers] == meta["layers"]
    assert list(pruner.filter_layers) == meta["fp_layers"]
    return pruner, golden, meta


def kept_kernels(pruner: PruneWrapper) -> dict[str, Tensor]:
    for layer in pruner.layers:  # what the mask says is what the weights show
        nonzero = layer.conv.weight.detach().flatten(2).any(2)
        assert torch.equal(nonzero, layer.conv.mask[:, :, 0, 0] == 1)
    return {layer.name: layer.conv.weight.detach().flatten(2).any(2) for layer in pruner.layers}


def rule_mask(pruner: PruneWrapper, state: dict[str, Tensor], name: str, beta: float) -> Tensor:
    weight = state[f"{name}.weight"]
    mask = group_channel_masks(weight, hard_groups(state[f"{name}.group"]), beta)
    return mask & filter_mask(weight, beta)[:, None] if name in pruner.filter_layers else mask


@pytest.mark.parametrize("case", range(4), ids=["16x16", "32x16", "1x1", "empty-group"])
def test_masks_of_single_layers(shared: Path, case: int) -> None:
    golden = np.load(shared / "golden" / "masks.npz")
    betas = json.loads(str(golden["meta"]))[case]["betas"]
    weight = torch.from_numpy(golden[f"case{case}/w"])
    groups = hard_groups(torch.from_numpy(golden[f"case{case}/logits"]))
    assert groups.tolist() == golden[f"case{case}/hard"].tolist()
    energy = kernel_energy(weight)
    compared = 0
    for number, beta in enumerate(betas):
        expected = {
            kind: golden[f"case{case}/beta{number}/{kind}"]
            for kind in ("mask_channels", "mask_channels_and_filters", "count", "count_filters")
        }
        count = torch.from_numpy(expected["count"])
        n_groups = len(count)
        assert count_below(channel_shares(energy, groups, n_groups), beta).tolist() == count.tolist()
        assert int(count_below(filter_shares(energy), beta)) == int(expected["count_filters"])
        channels = group_channel_masks(weight, groups, beta)
        comparable = count[groups] > 0  # at 0 the original prunes the whole group
        assert torch.equal(channels[comparable], torch.from_numpy(expected["mask_channels"])[comparable])
        assert channels[~comparable].all()
        compared += int(comparable.sum())
        if expected["count_filters"] > 0:
            both = channels & filter_mask(weight, beta)[:, None]
            wanted = torch.from_numpy(expected["mask_channels_and_filters"])
            assert torch.equal(both[comparable], wanted[comparable])
        else:
            assert filter_mask(weight, beta).all()
    assert compared >= 2 * len(weight)


@pytest.mark.parametrize("rate", RATES)
def test_resnet20_after_the_dead_pass_at_every_beta(shared: Path, rate: str) -> None:
    pruner, golden, meta = load(shared, "resnet20", rate)
    assert not meta["wraparound"]  # so that every group of every step may be compared
    for step in STEPS:
        flops, params = pruner.prune_at(float(golden[f"{step}/beta"]))
        for name, kernels in kept_kernels(pruner).items():
            assert np.array_equal(kernels.numpy(), golden[f"{step}/kernels/{name}"]), (step, name)
        assert flops == pytest.approx(float(golden[f"{step}/pflops"]), abs=PERCENT)
        assert params == pytest.approx(float(golden[f"{step}/pparams"]), abs=PERCENT)
        for key in golden:
            if key.startswith(f"{step}/bn_alive/stage"):
                norm = pruner.model.get_submodule(key.split("/")[2])
                cleared = (norm.weight == 0) & (norm.bias == 0)
                assert np.array_equal(cleared.numpy(), ~golden[key]), (step, key)
            if key.startswith(f"{step}/other_kernels/"):
                weight = pruner.model.get_submodule(key.split("/")[2]).weight
                assert np.array_equal(weight.flatten(2).any(2).numpy(), golden[key]), (step, key)


@pytest.mark.parametrize("net", ["toyA", "resnet20"])
@pytest.mark.parametrize("rate", RATES)
def test_rule_before_the_dead_pass(shared: Path, net: str, rate: str) -> None:
    pruner, golden, meta = load(shared, net, rate)
    assert not meta["wraparound"]
    state = {key: value.clone() for key, value in pruner.model.state_dict().items()}
    for step in STEPS:
        beta = float(golden[f"{step}/beta"])
        pruner.prune_at(beta)
        for layer in pruner.layers:
            name = layer.name
            energy = kernel_energy(state[f"{name}.weight"])
            shares = channel_shares(energy, hard_groups(state[f"{name}.group"]), meta["n_groups"])
            assert count_below(shares, beta).tolist() == golden[f"{step}/count/{name}"].tolist()
            if name in pruner.filter_layers:
                assert int(count_below(filter_shares(energy), beta)) == golden[f"{step}/countfp/{name}"]
            mask = rule_mask(pruner, state, name, beta)
            kept = torch.from_numpy(golden[f"{step}/kernels/{name}"])
            assert not (kept & ~mask).any(), (step, name)  # a dead pass only takes away
            assert not ((layer.conv.mask[:, :, 0, 0] == 1) & ~mask).any(), (step, name)
    for layer in pruner.layers:
        mask = rule_mask(pruner, state, layer.name, float(golden["final/beta"]))
        assert np.array_equal(mask.numpy(), golden[f"final/mask0/{layer.name}"]), layer.name


@pytest.mark.parametrize(("rate", "kernels"), [("0.3", 229), ("0.5", 167), ("0.7", 75)])
def test_toy_net_goes_on_to_the_fixpoint(shared: Path, rate: str, kernels: int) -> None:
    pruner, golden, meta = load(shared, "toyA", rate)
    flops, _ = pruner.prune_at(float(golden["final/beta"]))
    kept = kept_kernels(pruner)
    assert sum(int(mask.sum()) for mask in kept.values()) == kernels
    assert meta["kernels_alive_after_repeating_dead_pass"] == kernels
    assert flops == pytest.approx(meta["pflops_after_repeating_dead_pass"], abs=PERCENT)
    for name, mask in kept.items():  # one pass of the original is a part of the fixpoint
        assert not (mask & ~torch.from_numpy(golden[f"final/kernels/{name}"])).any()


@pytest.mark.parametrize("net", ["toyA", "resnet20"])
@pytest.mark.parametrize("rate", RATES)
def test_the_target_is_met_more_closely_than_by_the_original(shared: Path, net: str, rate: str) -> None:
    pruner, golden, _ = load(shared, net, rate)
    target = 100 * float(rate)
    flops, _ = pruner.initialize(float(rate))
    assert flops >= target
    for step in STEPS:
        other, _ = pruner.prune_at(float(golden[f"{step}/beta"]))
        assert other < target or other >= flops
