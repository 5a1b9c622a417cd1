"""Which channels of each filter group, and which filters of a layer, a threshold beta prunes.

Everything here is a pure function of weights and groups, computed in float64 on the CPU.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.layers import LayerInfo

__all__ = [
    "LayerRule",
    "Masks",
    "Target",
    "candidate_betas",
    "channel_shares",
    "check_buffers",
    "check_settings",
    "count_below",
    "filter_layer_indices",
    "filter_mask",
    "filter_shares",
    "first_reaching",
    "fraction",
    "group_channel_masks",
    "hard_groups",
    "has_logits",
    "keep",
    "keep_multiples",
    "kernel_costs",
    "kernel_energy",
    "layer_rule",
    "mask_matrix",
    "percent_pruned",
    "register_buffers",
    "summary_row",
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


# What a rate is a share of: multiply-adds, or weights.
Target = Literal["macs", "params"]

Masks = Mapping[str, Tensor]  # layer name -> [O, C] bool, True for a kernel that is kept


def check_settings(target: str, channel_multiple: int, prune_channels: bool) -> None:
    """Raises DSPPruningError for a setting of PruneWrapper that is out of range."""
    if target not in get_args(Target):
        raise DSPPruningError(f"target is {target!r}; expected one of {', '.join(get_args(Target))}")
    if isinstance(channel_multiple, bool) or not isinstance(channel_multiple, int) or channel_multiple < 1:
        raise DSPPruningError(
            f"channel_multiple is {channel_multiple!r}; expected a whole number of at least 1"
        )
    if channel_multiple > 1 and not prune_channels:
        raise DSPPruningError("channel_multiple rounds pruned channels, but prune_channels is False")


def fraction(value: float, what: str) -> float:
    """The value as a number. Raises DSPPruningError, which calls it ``what``, if it is not within 0..1."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= 1:  # NaN fails here too
        raise DSPPruningError(f"{what} is {value!r}; expected a fraction from 0 to 1, for example 0.5")
    return number


def check_buffers(layers: Sequence[LayerInfo], counts: Sequence[int]) -> None:
    """Raises DSPPruningError where a conv has a ``group`` or a ``mask`` of another shape already.

    counts: G of every layer.
    """
    for layer, n_groups in zip(layers, counts, strict=True):
        shapes = {
            "group": (n_groups, layer.out_channels),
            "mask": (layer.out_channels, layer.in_channels, 1, 1),
        }
        for kind, shape in shapes.items():
            present = getattr(layer.conv, kind, None)
            if present is not None and (not isinstance(present, Tensor) or tuple(present.shape) != shape):
                raise DSPPruningError(
                    f"layer {layer.name!r} already has a {kind!r} of shape "
                    f"{tuple(getattr(present, 'shape', ()))}; n_groups={n_groups} needs {shape}"
                )


def register_buffers(layer: LayerInfo, n_groups: int) -> None:
    """Put ``group`` [G, O] and ``mask`` [O, C, 1, 1] on the conv as buffers; what is there already stays.

    A ``group`` that was a Parameter while groups were learned becomes a buffer.
    """
    conv = layer.conv
    # Logits stay float32 or better: half precision would make ties of what was learned.
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    group = conv.weight.new_zeros(n_groups, layer.out_channels, dtype=dtype)
    mask = conv.weight.new_ones(layer.out_channels, layer.in_channels, 1, 1)
    for kind, fresh in (("group", group), ("mask", mask)):
        present = getattr(conv, kind, None)
        if hasattr(conv, kind):
            delattr(conv, kind)
        conv.register_buffer(kind, (fresh if present is None else present).detach().clone())


def filter_layer_indices(
    every_nth: int | None, indices: Sequence[int] | int | None, n_layers: int
) -> tuple[int, ...]:
    """Which of the layers prune filters: ``indices`` if given, else every n-th; -1 or [] means none.

    Raises DSPPruningError if neither is given or one is out of range.
    """
    if indices is not None:
        if isinstance(indices, int) and indices == -1:
            return ()
        try:
            chosen = sorted({operator.index(index) for index in indices})  # type: ignore[union-attr]
        except TypeError:
            raise DSPPruningError(
                f"fp_layer_indices is {indices!r}; expected a list of layer indices, or -1 or [] for none"
            ) from None
        wrong = [index for index in chosen if not 0 <= index < n_layers]
        if wrong:
            raise DSPPruningError(f"fp_layer_indices holds {wrong[0]}; expected 0 to {n_layers - 1}")
        return tuple(chosen)
    if every_nth is None:
        raise DSPPruningError(
            "neither fp_every_nth_conv nor fp_layer_indices is given; name the layers that prune filters, "
            "or pass fp_every_nth_conv=-1 to prune none"
        )
    if isinstance(every_nth, bool) or not isinstance(every_nth, int) or (every_nth < 1 and every_nth != -1):
        raise DSPPruningError(f"fp_every_nth_conv is {every_nth!r}; expected 1 or more, or -1 for no filters")
    return tuple(range(every_nth - 1, n_layers, every_nth)) if every_nth > 0 else ()


@dataclass(frozen=True, eq=False)
class LayerRule:
    """What any beta prunes of one layer, as long as its weights stay as they were.

    alive: [O, C] bool, the kernels that are not zero already; energy: [O, C], their sums of squares;
    groups: [O]; channels: [G, C] shares and filters: [O] shares, each None where they are not pruned.
    """

    name: str
    alive: Tensor
    energy: Tensor
    groups: Tensor
    channels: Tensor | None
    filters: Tensor | None

    @property
    def shares(self) -> tuple[Tensor, ...]:
        """Every set of shares that beta cuts."""
        return tuple(shares for shares in (self.channels, self.filters) if shares is not None)

    def mask(self, beta: float, multiple: int = 1, barred: Tensor | None = None) -> Tensor:
        """[O, C] bool: the kernels that are kept, before the dead ones are looked for.

        multiple: each group keeps a multiple of so many channels, none of them from barred [G, C].
        """
        kept = self.alive
        if self.channels is not None:
            if multiple == 1 or barred is None:
                chosen = keep(self.channels, beta)
            else:
                chosen = keep_multiples(self.channels, beta, multiple, barred)
            kept = kept & chosen[self.groups]
        return kept if self.filters is None else kept & keep(self.filters, beta)[:, None]

    def columns(self, mask: Tensor) -> Tensor:
        """mask: [O, C] bool -> [G, C] bool: the channels that some filter of a group reads."""
        n_groups = int(self.groups.max()) + 1 if self.channels is None else len(self.channels)
        read = torch.zeros(n_groups, mask.shape[1], dtype=torch.int64)
        return read.index_add_(0, self.groups, mask.long()) > 0


def layer_rule(
    layer: LayerInfo, weight: Tensor, mask: Tensor, prunes_filters: bool, prunes_channels: bool = True
) -> LayerRule:
    """weight: [O, C, kh, kw] and mask: [O, C, 1, 1] from before the pruning; the groups are the conv's.

    Raises DSPPruningError if a weight or a logit is not finite.
    """
    logits = layer.conv.get_buffer("group")
    for what, values in (("weights", weight), ("group logits", logits)):
        if not values.isfinite().all():
            raise DSPPruningError(f"layer {layer.name!r} has {what} that are not finite; it cannot be pruned")
    energy = kernel_energy(weight.masked_fill(mask == 0, 0))
    groups = hard_groups(logits)
    # Asked of the weights themselves: a tiny weight's square may be 0.
    alive = ((weight != 0) & (mask != 0)).flatten(2).any(2).cpu()
    filters = filter_shares(energy) if prunes_filters else None
    channels = channel_shares(energy, groups, len(logits)) if prunes_channels else None
    return LayerRule(layer.name, alive, energy, groups, channels, filters)


def has_logits(layer: LayerInfo) -> bool:
    """Whether group logits were learned or loaded; one group needs none."""
    logits = layer.conv.get_buffer("group")
    return len(logits) == 1 or bool(logits.any())


def mask_matrix(layer: LayerInfo) -> Tensor:
    """[O, C] bool on the CPU: the conv's mask."""
    return layer.conv.get_buffer("mask")[:, :, 0, 0].cpu() != 0


def kernel_costs(layers: Sequence[LayerInfo], target: Target) -> dict[str, int]:
    """Layer name -> what one 2-D kernel costs: multiply-adds of one sample, or weights."""
    if target == "macs":
        return {layer.name: _macs_per_kernel(layer) for layer in layers}
    return {layer.name: math.prod(layer.kernel_size) for layer in layers}


def percent_pruned(layers: Sequence[LayerInfo], masks: Masks) -> tuple[float, float]:
    """Multiply-adds and weights that are pruned, each in percent of these layers'."""
    kernels = {layer.name: layer.out_channels * layer.in_channels for layer in layers}
    kept = {name: int(masks[name].sum()) for name in kernels}
    percent = []
    for target in get_args(Target):
        costs = kernel_costs(layers, target)
        whole = sum(cost * kernels[name] for name, cost in costs.items())
        gone = sum(cost * (kernels[name] - kept[name]) for name, cost in costs.items())
        percent.append(100 * (gone / whole))
    return percent[0], percent[1]


def summary_row(
    layer: LayerInfo, mask: Tensor, prunes_filters: bool, note: str
) -> dict[str, int | str | bool | list[int]]:
    """One layer's sizes, each with what mask [O, C] keeps of it, as plain numbers and text."""
    logits = layer.conv.get_buffer("group")
    groups = hard_groups(logits)[mask.any(1)]
    return {
        "name": layer.name,
        "filters": layer.out_channels,
        "filters_kept": int(mask.any(1).sum()),
        "channels": layer.in_channels,
        "channels_kept": int(mask.any(0).sum()),
        "groups": len(logits),
        "groups_kept": len(groups.unique()),
        "group_channels": [int(mask[mask.any(1)][groups == g].any(0).sum()) for g in groups.unique()],
        "kernels": mask.numel(),
        "kernels_kept": int(mask.sum()),
        "macs": layer.macs,
        "macs_kept": _macs_per_kernel(layer) * int(mask.sum()),
        "prunes_filters": prunes_filters,
        "note": note,
    }


def _macs_per_kernel(layer: LayerInfo) -> int:
    return layer.macs // (layer.out_channels * layer.in_channels)
