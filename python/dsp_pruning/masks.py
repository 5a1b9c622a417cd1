"""Which channels of each filter group, and which filters of a layer, a threshold beta prunes.

Everything here is a pure function of weights and groups, computed in float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

__all__ = [
    "candidate_betas",
    "channel_shares",
    "count_below",
    "filter_mask",
    "filter_shares",
    "first_reaching",
    "group_channel_masks",
    "hard_groups",
    "keep",
    "keep_multiples",
    "kernel_energy",
]

_EPS = 1e-12  # golden README section 5: share = energy / (total + 1e-12)


def hard_groups(logits: Tensor) -> Tensor:
    """logits: [G, O] -> [O] int64, the group of each filter: the largest logit, ties to the lowest index."""
    logits = logits.detach().cpu()
    index = torch.arange(len(logits))[:, None].expand_as(logits)
    return index.masked_fill(logits != logits.amax(0), len(logits)).amin(0)


def kernel_energy(weight: Tensor) -> Tensor:
    """weight: [O, C, kh, kw] -> [O, C] float64, the sum of squares of each 2-D kernel."""
    return weight.detach().cpu().double().square().flatten(2).sum(2)


def channel_shares(energy: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """energy: [O, C]; groups: [O] -> [G, C], what each input channel holds of its group's energy.

    A group without filters, or with zero weights only, has shares of 0.
    """
    per_group = torch.zeros(n_groups, energy.shape[1], dtype=energy.dtype).index_add_(0, groups, energy)
    return per_group / (per_group.sum(1, keepdim=True) + _EPS)


def filter_shares(energy: Tensor) -> Tensor:
    """energy: [O, C] -> [O], what each filter holds of its layer's energy."""
    return energy.sum(1) / (energy.sum() + _EPS)


def count_below(shares: Tensor, beta: float) -> Tensor:
    """shares: [..., N] -> [...] int64: how many cumulative sums, smallest share first, are below beta."""
    return (_cumulative(shares) < beta).sum(-1)


def keep(shares: Tensor, beta: float) -> Tensor:
    """shares: [..., N] -> bool of that shape; False for the ``count_below(shares, beta)`` smallest.

    Nothing below beta means that nothing is pruned. Of equal shares the lower index goes first, so that
    equal channels never go all at once.
    """
    order = shares.sort(stable=True, dim=-1).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(shares.shape[-1]).expand_as(order))
    return rank >= count_below(shares, beta)[..., None]


def keep_multiples(shares: Tensor, beta: float, multiple: int, barred: Tensor) -> Tensor:
    """As ``keep``, but each row keeps a multiple of ``multiple``, and nothing that is barred.

    shares, barred: [G, C]; barred is bool. The number that ``keep`` leaves is rounded to the nearest
    multiple, and to at least one; where fewer are not barred, to the largest multiple among these. A row
    with less than one multiple to choose from keeps all of it. The largest shares stay.
    """
    usable = (~barred).sum(-1)
    left = (keep(shares, beta) & ~barred).sum(-1)
    wanted = ((left + multiple // 2) // multiple * multiple).clamp_min(multiple)
    wanted = torch.minimum(wanted, usable // multiple * multiple)
    wanted = torch.where(usable < multiple, usable, wanted) * (left > 0)
    order = shares.masked_fill(barred, -1).sort(stable=True, dim=-1).indices
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(shares.shape[-1]).expand_as(order))
    return rank >= (shares.shape[-1] - wanted)[..., None]


def group_channel_masks(weight: Tensor, groups: Tensor, beta: float) -> Tensor:
    """Group channel pruning of one layer (golden README section 5, "channels").

    weight: [O, C, kh, kw]; groups: [O] int64. Returns [O, C] bool, True for a kernel that is kept.
    """
    n_groups = int(groups.max()) + 1 if len(groups) else 0
    return keep(channel_shares(kernel_energy(weight), groups.cpu(), n_groups), beta)[groups.cpu()]


def filter_mask(weight: Tensor, beta: float) -> Tensor:
    """Filter pruning of one layer (golden README section 5, "Filters"), on weights before any mask.

    weight: [O, C, kh, kw]. Returns [O] bool, True for a filter that is kept.
    """
    return keep(filter_shares(kernel_energy(weight)), beta)


def candidate_betas(shares: Iterable[Tensor]) -> list[float]:
    """shares: several [..., N]. Every beta at which some count changes, ascending, from 0 on.

    Any other beta prunes the same as the next candidate above it. The largest candidate still leaves one
    member to every set of shares that is not all zero.
    """
    rows = [row for each in shares for row in _cumulative(each).reshape(-1, each.shape[-1]) if row[-1] > 0]
    if not rows:
        return [0.0]
    highest = min(float(row[-1]) for row in rows)
    every = torch.cat(rows).unique()
    return [0.0, *every[(every > 0) & (every <= highest)].tolist()]


def first_reaching(reaches: Callable[[int], bool], count: int) -> int:
    """The first index below count for which ``reaches`` holds, count if none; once it holds it stays so."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if reaches(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _cumulative(shares: Tensor) -> Tensor:
    return shares.sort(stable=True, dim=-1).values.cumsum(-1)
