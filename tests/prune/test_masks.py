"""The pruning rule of one layer: monotone in beta, nothing pruned below it, ties broken by index."""

from __future__ import annotations

import itertools

import pytest
import torch

from dsp_pruning.prune.rule import (
    candidate_betas,
    channel_shares,
    filter_shares,
    group_channel_masks,
    hard_groups,
    keep,
    kernel_energy,
)


def test_nothing_below_beta_prunes_nothing() -> None:
    weight = torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1)  # shares 1/14, 4/14, 9/14
    groups = torch.tensor([0])
    assert group_channel_masks(weight, groups, 0.0).all()
    assert group_channel_masks(weight, groups, 0.07).all()
    assert group_channel_masks(weight, groups, 0.08).tolist() == [[False, True, True]]
    assert group_channel_masks(weight, groups, 0.36).tolist() == [[False, False, True]]


def test_equal_channels_do_not_all_go_at_once() -> None:
    shares = channel_shares(torch.ones(2, 4), torch.tensor([0, 0]), 1)
    assert keep(shares, 0.3).tolist() == [[False, True, True, True]]
    assert keep(shares, 0.6).sum() == 2


@pytest.mark.parametrize("seed", range(3))
def test_masks_only_shrink_as_beta_grows_and_change_at_the_candidates_alone(seed: int) -> None:
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


def test_ties_between_groups_go_to_the_lowest_index() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 3.0, 2.0], [-1.0, 3.0, 2.0]])
    assert hard_groups(logits).tolist() == [0, 1, 0]
