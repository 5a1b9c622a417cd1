"""The pruning rule: which channels of each filter group, and which filters, a threshold beta prunes.

Pure functions of weights and groups, computed in float64 on the CPU.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.layers import LayerInfo
from dsp_pruning.learn.penalty import hard_assignment

Masks = Mapping[str, Tensor]  # layer name -> [O, C] bool, True for a kernel that is kept

_EPS = 1e-12  # of the published rule: share = energy / (total + eps)


def hard_groups(logits: Tensor) -> Tensor:
    """logits: [G, O] -> [O] int64, the group of each filter: the largest logit, ties to the lowest group."""
    return hard_assignment(logits.detach().cpu()).argmax(0)


def kernel_energy(weight: Tensor) -> Tensor:
    """weight: [O, C, kh, kw] -> [O, C] float64, the sum of squares of each 2-D kernel."""
    return weight.detach().cpu().double().square().flatten(2).sum(2)


def channel_shares(energy: Tensor, groups: Tensor, n_groups: int) -> Tensor:
    """energy: [O, C]; groups: [O] -> [G, C], the share of each input channel in its group's energy."""
    per_group = torch.zeros(n_groups, energy.shape[1], dtype=energy.dtype).index_add_(0, groups, energy)
    return per_group / (per_group.sum(1, keepdim=True) + _EPS)


def filter_shares(energy: Tensor) -> Tensor:
    """energy: [O, C] -> [O], the share of each filter in its layer's energy."""
    return energy.sum(1) / (energy.sum() + _EPS)


def count_below(shares: Tensor, beta: float) -> Tensor:
    """shares: [..., N] -> [...] int64: how many cumulative sums, smallest share first, are below beta."""
    return (_cumulative(shares) < beta).sum(-1)


def keep(shares: Tensor, beta: float) -> Tensor:
    """shares: [..., N] -> bool of that shape, False for the ``count_below(shares, beta)`` smallest.

    Of equal shares the lower index is pruned first, so equal channels are not all pruned at once.
    """
    return _rank(shares) >= count_below(shares, beta)[..., None]


def keep_multiples(shares: Tensor, beta: float, multiple: int, barred: Tensor) -> Tensor:
    """As ``keep``, but each row keeps a multiple of ``multiple``, and nothing that is barred.

    shares, barred: [G, C]; barred is bool. The number that ``keep`` leaves is rounded to the nearest
    multiple, to at least one, and to at most what is not barred. A row with less than one multiple to choose
    from keeps all of it. The largest shares are kept.
    """
    usable = (~barred).sum(-1)
    left = (keep(shares, beta) & ~barred).sum(-1)
    wanted = ((left + multiple // 2) // multiple * multiple).clamp_min(multiple)
    wanted = torch.minimum(wanted, usable // multiple * multiple)
    wanted = torch.where(usable < multiple, usable, wanted) * (left > 0)
    return _rank(shares.masked_fill(barred, -1)) >= (shares.shape[-1] - wanted)[..., None]


def candidate_betas(shares: Iterable[Tensor]) -> list[float]:
    """shares: several [..., N]. Every beta at which some count changes, ascending from 0.

    Any other beta prunes the same as the next larger candidate. The largest candidate still leaves one member
    of every row that is not all zero.
    """
    rows = [row for each in shares for row in _cumulative(each).reshape(-1, each.shape[-1]) if row[-1] > 0]
    if not rows:
        return [0.0]
    highest = min(float(row[-1]) for row in rows)
    every = torch.cat(rows).unique()
    return [0.0, *every[(every > 0) & (every <= highest)].tolist()]


def _cumulative(shares: Tensor) -> Tensor:
    return shares.sort(stable=True, dim=-1).values.cumsum(-1)


def _rank(shares: Tensor) -> Tensor:
    order = shares.sort(stable=True, dim=-1).indices
    return torch.empty_like(order).scatter_(-1, order, torch.arange(shares.shape[-1]).expand_as(order))


@dataclass(frozen=True, eq=False)
class LayerRule:
    """What any beta prunes of one layer with fixed weights.

    alive: [O, C] bool, the kernels that are not zero already. energy: [O, C]. groups: [O].
    channels: [G, C] shares, filters: [O] shares; None if they are not pruned.
    """

    name: str
    alive: Tensor
    energy: Tensor
    groups: Tensor
    channels: Tensor | None
    filters: Tensor | None

    def mask(
        self, beta: float, filter_beta: float | None = None, multiple: int = 1, barred: Tensor | None = None
    ) -> Tensor:
        """[O, C] bool: what is kept, before dead kernels are removed. barred: [G, C], see keep_multiples.

        filter_beta: the filters' own threshold, if it is another one.
        """
        kept = self.alive
        if self.channels is not None:
            if barred is None:
                chosen = keep(self.channels, beta)
            else:
                chosen = keep_multiples(self.channels, beta, multiple, barred)
            kept = kept & chosen[self.groups]
        if self.filters is not None:
            kept = kept & keep(self.filters, beta if filter_beta is None else filter_beta)[:, None]
        return kept

    def columns(self, mask: Tensor) -> Tensor:
        """mask: [O, C] bool -> [G, C] bool: the channels that some filter of a group reads."""
        assert self.channels is not None
        read = torch.zeros(self.channels.shape, dtype=torch.int64)
        return read.index_add_(0, self.groups, mask.long()) > 0


def layer_rule(
    layer: LayerInfo, weight: Tensor, mask: Tensor, prunes_filters: bool, prunes_channels: bool
) -> LayerRule:
    """weight: [O, C, kh, kw] and mask: [O, C, 1, 1] before pruning; the groups are those of the conv."""
    logits = layer.conv.get_buffer("group")
    for what, values in (("weights", weight), ("group logits", logits)):
        if not values.isfinite().all():
            raise DSPPruningError(f"layer {layer.name!r} has {what} that are not finite; it cannot be pruned")
    energy = kernel_energy(weight.masked_fill(mask == 0, 0))
    groups = hard_groups(logits)
    # Not energy != 0, because the square of a tiny weight may be 0.
    alive = ((weight != 0) & (mask != 0)).flatten(2).any(2).cpu()
    filters = filter_shares(energy) if prunes_filters else None
    channels = channel_shares(energy, groups, len(logits)) if prunes_channels else None
    return LayerRule(layer.name, alive, energy, groups, channels, filters)
