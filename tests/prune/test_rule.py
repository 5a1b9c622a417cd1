"""The pruning rule: monotone in beta, ties by index, and masks and shares equal to the published ones."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import ToyA
from torch import Tensor, nn

from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.prune.rule import (
    candidate_betas,
    channel_shares,
    count_below,
    filter_shares,
    hard_groups,
    keep,
    keep_multiples,
    kernel_energy,
)
from dsp_pruning.prune.wrapper import PruneWrapper


def test_channels_are_pruned_while_their_cumulative_share_is_below_beta() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)
    shares = channel_shares(kernel_energy(weight), torch.tensor([0]), 1)  # 1/14, 4/14, 9/14
    assert keep(shares, 0.0).all()
    assert keep(shares, 0.07).all()
    assert keep(shares, 0.08).tolist() == [[False, True, True]]
    assert keep(shares, 0.36).tolist() == [[False, False, True]]


def test_equal_channels_are_not_all_pruned_at_once() -> None:
    shares = channel_shares(torch.ones(2, 4), torch.tensor([0, 0]), 1)
    assert keep(shares, 0.3).tolist() == [[False, True, True, True]]
    assert keep(shares, 0.6).sum() == 2


def test_multiples_keep_the_largest_shares_that_are_not_barred() -> None:
    shares = torch.tensor([[0.05, 0.1, 0.15, 0.2, 0.5]])
    barred = torch.tensor([[False, False, False, False, True]])
    assert keep_multiples(shares, 0.2, 2, barred).tolist() == [[False, False, True, True, False]]
    assert keep_multiples(shares, 0.2, 8, barred).tolist() == (~barred).tolist()  # fewer than one multiple


@pytest.mark.parametrize("seed", range(3))
def test_masks_shrink_as_beta_grows_and_change_at_the_candidates_only(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(9, 7, 3, 3, generator=generator)
    energy, groups = kernel_energy(weight), torch.randint(4, (9,), generator=generator)
    sets = [channel_shares(energy, groups, 4), filter_shares(energy)]
    betas = candidate_betas(sets)
    assert betas[0] == 0
    assert betas == sorted(set(betas))
    for low, high in itertools.pairwise(betas):
        for shares in sets:
            assert not (keep(shares, high) & ~keep(shares, low)).any()
            assert torch.equal(keep(shares, (low + high) / 2), keep(shares, high))
        assert any(not torch.equal(keep(shares, high), keep(shares, low)) for shares in sets) or low == 0
    assert keep(sets[1], betas[-1]).any()
    assert keep(sets[0], betas[-1])[groups.unique()].any(1).all()


@pytest.mark.shared
@pytest.mark.parametrize("case", range(4), ids=["16x16", "32x16", "1x1", "empty-group"])
def test_masks_equal_the_published_ones(shared: Path, case: int) -> None:
    golden = np.load(shared / "golden" / "masks.npz")
    betas = json.loads(str(golden["meta"]))[case]["betas"]
    weight = torch.from_numpy(golden[f"case{case}/w"])
    groups = hard_groups(torch.from_numpy(golden[f"case{case}/logits"]))
    assert groups.tolist() == golden[f"case{case}/hard"].tolist()
    energy = kernel_energy(weight)
    compared = 0
    for number, beta in enumerate(betas):
        wanted = {
            kind: torch.from_numpy(np.asarray(golden[f"case{case}/beta{number}/{kind}"]))
            for kind in ("mask_channels", "mask_channels_and_filters", "count", "count_filters")
        }
        by_channel, by_filter = channel_shares(energy, groups, len(wanted["count"])), filter_shares(energy)
        assert torch.equal(count_below(by_channel, beta), wanted["count"].long())
        assert int(count_below(by_filter, beta)) == int(wanted["count_filters"])
        channels, filters = keep(by_channel, beta)[groups], keep(by_filter, beta)
        # With a count of 0 the published code prunes the whole group, or every filter.
        comparable = wanted["count"][groups] > 0
        assert torch.equal(channels[comparable], wanted["mask_channels"][comparable])
        assert channels[~comparable].all()
        compared += int(comparable.sum())
        if wanted["count_filters"] > 0:
            both = channels & filters[:, None]
            assert torch.equal(both[comparable], wanted["mask_channels_and_filters"][comparable])
        else:
            assert filters.all()
    assert compared >= 2 * len(weight)


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
    assert not meta.get("wraparound")  # so that every group of every step may be compared
    return pruner, golden, meta


def kept_kernels(pruner: PruneWrapper) -> dict[str, Tensor]:
    kept = {layer.name: layer.conv.weight.detach().flatten(2).any(2) for layer in pruner.layers}
    for layer in pruner.layers:  # the weights show what the mask says
        assert torch.equal(kept[layer.name], layer.conv.mask[:, :, 0, 0] == 1)
    return kept


@pytest.mark.shared
@pytest.mark.parametrize("rate", RATES)
def test_resnet20_without_dead_kernels_at_every_beta(shared: Path, rate: str) -> None:
    pruner, golden, _ = load(shared, "resnet20", rate)
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


@pytest.mark.shared
@pytest.mark.parametrize(("rate", "kernels"), [("0.3", 229), ("0.5", 167), ("0.7", 75)])
def test_dead_kernels_are_removed_to_the_fixpoint(shared: Path, rate: str, kernels: int) -> None:
    pruner, golden, meta = load(shared, "toyA", rate)
    flops, _ = pruner.prune_at(float(golden["final/beta"]))
    kept = kept_kernels(pruner)
    assert sum(int(mask.sum()) for mask in kept.values()) == kernels
    assert meta["kernels_alive_after_repeating_dead_pass"] == kernels
    assert flops == pytest.approx(meta["pflops_after_repeating_dead_pass"], abs=PERCENT)
    for name, mask in kept.items():  # the published code does one pass
        assert not (mask & ~torch.from_numpy(golden[f"final/kernels/{name}"])).any()
