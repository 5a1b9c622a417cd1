"""assign_groups: groups from the weights alone, which minimise the energy that pruning will remove.

docs/notes/algorithm.md says how, and compares the result with other groups.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError
from dsp_kernels.graph.inputs import Example
from dsp_pruning.checks import check, check_kind
from dsp_pruning.distributed import unwrap
from dsp_pruning.layers import (
    GroupCount,
    LayerInfo,
    LayerPredicate,
    check_existing,
    groups_of_layers,
    survey_layers,
)
from dsp_pruning.prune.rule import kernel_energy

_RESTARTS = 8
_SIMILAR, _RISING, _LAST = 5, 20, 5  # steps by similarity, at most while the rate rises, at the full rate
_EPS = 1e-12  # as in the rule


def assign_groups(
    model: nn.Module,
    n_groups: GroupCount,
    rate: float,
    *,
    example_input: Example | None = None,
    layers: LayerPredicate | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Assign the filters of every layer to groups by their weights: no data, no training, seconds.

    Each layer gets the groups found that keep most energy (sum of squared weights) when the pruning rule
    removes ``rate`` of its kernels; never less than contiguous groups keep.

    Returns layer name -> [O] int64, the group of each filter. The model gets ``<conv>.group`` [G, O], 1 for a
    filter's group and 0 elsewhere: the logits that GroupWrapper learns and starts from, and that PruneWrapper
    reads. Existing values are replaced.

    n_groups, example_input, layers: as in PruneWrapper; the same layers take part.
    rate: share of the kernels that is to be pruned later, 0 <= rate < 1.
    generator: draws the filters that each search starts from; None makes one from seed 0.

    Raises DSPPruningError for a setting out of range, if no layer is left, or if a weight is not finite;
    DSPShapeError if the model does not run on the example.

    >>> from dsp_pruning import PruneWrapper
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    >>> kernels = [[2, 3, 0.1, 0.1], [0.1, 0.1, 2, 2], [3, 2, 0.1, 0.1], [0.1, 0.1, 3, 2]]
    >>> model[1].weight.data[:, :, 0, 0] = torch.tensor(kernels)
    >>> assign_groups(model, n_groups=2, rate=0.5)
    {'1': tensor([1, 0, 1, 0])}
    >>> PruneWrapper(model, n_groups=2, fp_layer_indices=[]).initialize(rate=0.5)
    (50.0, 50.0)
    """
    survey = survey_layers(unwrap(model), example_input, layers)
    check_rate(rate)
    is_generator = generator is None or isinstance(generator, torch.Generator)
    check_kind(is_generator, "generator", generator, "a torch.Generator")
    survey, counts = groups_of_layers(survey, n_groups)
    return write_groups(survey.chosen, counts, rate, generator or torch.Generator().manual_seed(0))


def check_rate(rate: object) -> None:
    """Raise DSPPruningError unless ``0 <= rate < 1``."""
    valid = isinstance(rate, int | float) and 0 <= rate < 1
    check(valid, "rate", rate, "a fraction of at least 0 and below 1, for example 0.5")


def write_groups(
    layers: Sequence[LayerInfo], counts: Mapping[str, int], rate: float, generator: torch.Generator
) -> dict[str, Tensor]:
    """``assign_groups`` of layers that are chosen already. counts: layer name -> G."""
    found = {}
    for layer in layers:
        check_existing(layer, "group", (counts[layer.name], layer.out_channels))
        energy = kernel_energy(layer.conv.weight)
        if not energy.isfinite().all():
            raise DSPPruningError(f"layer {layer.name!r} has weights that are not finite; it gets no groups")
        found[layer.name] = best_groups(energy, counts[layer.name], rate, generator)
    for layer in layers:
        conv, logits = layer.conv, F.one_hot(found[layer.name], counts[layer.name]).mT
        present = getattr(conv, "group", None)
        if present is None:
            dtype = torch.promote_types(conv.weight.dtype, torch.float32)
            conv.register_buffer("group", logits.to(conv.weight.device, dtype, copy=True).contiguous())
        else:
            present.detach().copy_(logits)
    return found


def best_groups(energy: Tensor, n_groups: int, rate: float, generator: torch.Generator) -> Tensor:
    """energy: [O, C] -> [O] int64, the group of each filter. All R searches run side by side.

    First like k-means on the normalised norms of the kernels. Then in turn: channels by the pruning rule, and
    each filter to the group whose channels keep most of its energy, less a price per kernel. The rate rises
    more slowly from search to search, from at once to over _RISING steps. Kernels that are zero cost nothing.
    """
    filters, alive = len(energy), (energy > 0).to(energy)
    rate = max(0.0, 1 - (1 - rate) * energy.numel() / max(1, int(alive.sum())))
    shapes = F.normalize(energy.sqrt(), dim=1)
    drawn = torch.rand(_RESTARTS, filters, generator=generator, device=generator.device).cpu()
    groups = (shapes[drawn.topk(n_groups).indices] @ shapes.mT).argmax(1)  # [R, O]
    groups[0] = torch.arange(filters) * n_groups // filters
    rising = torch.linspace(0, _RISING, _RESTARTS, dtype=energy.dtype).round().clamp_min(1)
    best, kept = groups.clone(), energy.new_full((_RESTARTS,), -1)
    for step in range(1 - _SIMILAR, _RISING + _LAST + 1):
        members = F.one_hot(groups, n_groups).to(energy).mT  # [R, G, O]
        rule = _Rule(members @ energy, members @ alive)
        now = rule.kept(rule.beta(torch.full_like(kept, rate)))
        best[now > kept] = groups[now > kept]
        kept = torch.maximum(kept, now)
        if step <= 0:
            groups = (F.normalize(members @ shapes, dim=2) @ shapes.mT).argmax(1)
        else:
            sets, price = rule.sets(rule.beta(rate * (step / rising).clamp_max(1)))
            groups = (sets @ energy.mT - price * (sets @ alive.mT)).argmax(1)
    return best[kept.argmax()]


class _Rule:
    """The pruning rule of one layer for R assignments. energy, kernels: [R, G, C], sums over each group."""

    def __init__(self, energy: Tensor, kernels: Tensor) -> None:
        self.energy, self.kernels = energy, kernels
        self.sorted, self.order = energy.sort(dim=2, stable=True)
        self.shares = self.sorted.cumsum(2) / (energy.sum(2, keepdim=True) + _EPS)
        self.shares[..., -1] = torch.inf  # one channel of each group stays
        self.steps, order = self.shares.flatten(1).sort(dim=1)
        self.pruned = kernels.gather(2, self.order).flatten(1).gather(1, order).cumsum(1)

    def beta(self, rate: Tensor) -> Tensor:
        """rate: [R] -> [R, 1, 1], the smallest beta that prunes at least this share of the kernels."""
        wanted = rate[:, None] * self.pruned[:, -1:]
        place = torch.searchsorted(self.pruned, wanted * (1 - _EPS))
        above = self.steps.gather(1, place).nextafter(torch.full_like(wanted, torch.inf))
        return above.masked_fill(wanted == 0, 0)[..., None]

    def kept(self, beta: Tensor) -> Tensor:
        """[R]: the energy that stays."""
        return (self.sorted * (self.shares >= beta)).sum((1, 2))

    def sets(self, beta: Tensor) -> tuple[Tensor, Tensor]:
        """[R, G, C]: 1 for a channel that stays; [R, 1, 1]: energy per kernel of the weakest that stays."""
        stays = self.shares >= beta
        first = stays.to(torch.int8).argmax(2, keepdim=True)
        weakest, kernels = (of.gather(2, first) for of in (self.sorted, self.kernels.gather(2, self.order)))
        price = weakest.sum(1, keepdim=True) / kernels.sum(1, keepdim=True).clamp_min(1)
        sets = torch.zeros_like(self.energy).scatter_(2, self.order, stays.to(self.energy))
        return sets, price
