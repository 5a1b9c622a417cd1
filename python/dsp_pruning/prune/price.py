"""Pruning by price: what loses the least energy per unit of time that it saves goes first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from dsp_kernels import GroupStructure
from dsp_kernels.errors import DSPPruningError
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.times.model import Price
from dsp_pruning.layers import LayerInfo
from dsp_pruning.prune.rule import LayerRule, Masks, candidate_betas, count_below
from dsp_pruning.prune.search import ThresholdSearch

_MOST_POINTS = 24  # of a curve
_ROUNDS = 2  # the curves of a layer depend on what its neighbours have lost, so they are drawn again

Unit = tuple[str, str]  # a layer, and "channels" or "filters"
Betas = Mapping[Unit, float]  # the threshold of each; 0 where none is given


@dataclass(frozen=True)
class Point:
    """A threshold of one unit, with what it loses and saves beyond the state that a curve begins with.

    lost: mean over the layers of the share of their energy. saved: in the unit of the price.
    """

    beta: float
    lost: float
    saved: float


@dataclass(frozen=True, eq=False)
class PriceSearch:
    """Thresholds of its own for the channels and the filters of every layer. It changes nothing.

    price: of a convolution as it runs after packing. It is evaluated for whole networks without dead
    channels, so what pruning one layer saves in its neighbours counts, and what saves nothing stays.
    """

    search: ThresholdSearch
    price: Price
    _known: dict[object, float] = field(default_factory=dict, init=False)

    def masks(self, betas: Betas) -> tuple[Masks, bool]:
        """The masks without dead kernels, and whether the output still depends on the input."""
        return self.search.without_dead(
            {rule.name: self._mask(rule.name, betas) for rule in self.search.rules}
        )

    def cost(self, masks: Masks) -> float:
        """The price of all layers."""
        return sum(self._layer_cost(name, mask) for name, mask in masks.items())

    def pruned(self, masks: Masks) -> float:
        """Share of the price of the whole layers that these masks save, 0 to 1."""
        return 1 - self.cost(masks) / self._whole

    def lost(self, masks: Masks) -> float:
        """The mean over the layers of the share of their energy that these masks prune, 0 to 1."""
        return sum(self._loss(name, torch.ones_like(mask), mask) for name, mask in masks.items())

    def reachable(self) -> tuple[float, float] | None:
        """Smallest and largest share that is found; None if the output is constant in any case."""
        masks, connected = self.masks({})
        return (self.pruned(masks), self._shares(self.continued(1.0))[0]) if connected else None

    def chosen(self, rate: float) -> tuple[Masks, None]:
        """The masks that save at least ``rate``; there is no one beta."""
        return self.masks(self.best(rate))[0], None

    def best(self, rate: float) -> Betas:
        """Thresholds that save at least ``rate``, 0 to 1, and lose little energy."""
        betas: Betas = {}
        for done in range(1, _ROUNDS + 1):
            betas = self.continued(rate * done / _ROUNDS, betas)
        share, connected = self._shares(betas)
        if share < rate or not connected:
            raise DSPPruningError(
                f"pruning rate {rate} is out of reach for the {len(self.search.rules)} chosen layers with "
                f"these weights, groups and filter layers; within reach: 0 to {share:.6f}"
            )
        return betas

    def continued(self, rate: float, betas: Betas | None = None) -> Betas:
        """From some thresholds on, the least energy per saving first, until ``rate`` is saved or all is."""
        betas = betas or {}
        base, _ = self.masks(betas)
        steps = sorted(
            (step for unit in self._units for step in self._steps(unit, betas, base)),
            key=lambda step: step[0],
        )
        states = [betas]
        for _, unit, after, _ in steps:
            states.append({**states[-1], unit: after.beta})
        # What is saved grows with the steps, and the network is cut in two at some step and all later ones.
        low, high = -1, len(states) - 1
        while high - low > 1:
            middle = (low + high) // 2
            share, connected = self._shares(states[middle])
            low, high = (low, middle) if share >= rate or not connected else (middle, high)
        if not self._shares(states[high])[1]:
            return states[max(low, 0)]
        if high > 0:  # the last step has smaller ones on the same curve
            _, unit, _, between = steps[high - 1]
            for point in between:
                smaller = {**states[high - 1], unit: point.beta}
                if self._shares(smaller)[0] >= rate:
                    return smaller
        return states[high]

    def _steps(self, unit: Unit, betas: Betas, base: Masks) -> list[tuple[float, Unit, Point, list[Point]]]:
        """The sides of the curve's convex hull: energy per saving, and the points at and before its end."""
        useful = [point for point in self._curve(unit, betas, base) if point.saved > 0]
        points = [Point(0.0, 0.0, 0.0), *sorted(useful, key=lambda point: (point.saved, point.lost))]
        hull: list[Point] = []
        for point in points:
            if hull and point.saved <= hull[-1].saved:
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        return [
            (_slope(a, b), unit, b, [p for p in points if a.saved < p.saved < b.saved and p.lost < b.lost])
            for a, b in pairwise(hull)
        ]

    def _curve(self, unit: Unit, betas: Betas, base: Masks) -> list[Point]:
        points = []
        for beta in self._candidates(unit, betas.get(unit, 0.0)):
            # Pruned channels of a group seldom kill a channel; that shows when the curves are drawn again.
            masks: Masks = {**base, unit[0]: base[unit[0]] & self._mask(unit[0], {unit: beta})}
            connected = True
            if unit[1] == "filters":
                masks, connected = self.search.without_dead(masks)
            if not connected:
                break
            changed = [(name, base[name], masks[name]) for name in base if masks[name] is not base[name]]
            saved = sum(
                self._layer_cost(n, before) - self._layer_cost(n, after) for n, before, after in changed
            )
            points.append(Point(beta, sum(self._loss(*each) for each in changed), saved))
        return points

    def _mask(self, name: str, betas: Betas) -> Tensor:
        channels, filters = (betas.get((name, kind), 0.0) for kind in ("channels", "filters"))
        return self._rules[name].mask(channels, filters)

    def _loss(self, name: str, before: Tensor, after: Tensor) -> float:
        energy = self._rules[name].energy
        return float(energy[before & ~after].sum() / energy.sum().clamp_min(1e-300)) / len(self._rules)

    def _candidates(self, unit: Unit, above: float) -> list[float]:
        """Some thresholds, about as many channels or filters apart."""
        shares: Tensor = getattr(self._rules[unit[0]], unit[1])
        every = [beta for beta in candidate_betas([shares]) if beta > above]
        if len(every) <= _MOST_POINTS:
            return every
        gone = torch.tensor([float(count_below(shares, beta).sum()) for beta in every])
        wanted = torch.linspace(float(gone[0]), float(gone[-1]), _MOST_POINTS)
        return [every[index] for index in torch.searchsorted(gone, wanted).unique().tolist()]

    def _shares(self, betas: Betas) -> tuple[float, bool]:
        masks, connected = self.masks(betas)
        return self.pruned(masks), connected

    @cached_property
    def _rules(self) -> dict[str, LayerRule]:
        return {rule.name: rule for rule in self.search.rules}

    @cached_property
    def _layers(self) -> dict[str, LayerInfo]:
        return {layer.name: layer for layer in self.search.layers}

    @cached_property
    def _units(self) -> Sequence[Unit]:
        channels = [(rule.name, "channels") for rule in self.search.rules if rule.channels is not None]
        return channels + [(rule.name, "filters") for rule in self.search.rules if rule.filters is not None]

    @cached_property
    def _whole(self) -> float:
        return self.cost(
            {
                layer.name: torch.ones(layer.out_channels, layer.in_channels, dtype=torch.bool)
                for layer in self.search.layers
            }
        )

    def _layer_cost(self, name: str, mask: Tensor) -> float:
        """Of what packing leaves; equal numbers of filters and channels cost the same."""
        kernels = mask[mask.any(1)][:, mask.any(0)]
        members: dict[bytes, list[int]] = {}  # torch.unique takes 8 times as long for 512 filters
        for number, row in enumerate(kernels.numpy()):
            members.setdefault(row.tobytes(), []).append(number)
        if not members:
            return 0.0
        groups = [(kernels[rows[0]].nonzero().flatten().tolist(), rows) for rows in members.values()]
        layer, conv = self._layers[name], self._layers[name].conv
        settings = layer.input_hw, layer.kernel_size, conv.stride, conv.padding, conv.dilation
        key = (*settings, kernels.shape[1], *sorted((len(reads), len(rows)) for reads, rows in groups))
        if key not in self._known:
            padding = conv.padding
            if isinstance(padding, str):
                reach = [d * (k - 1) for d, k in zip(conv.dilation, layer.kernel_size, strict=True)]
                padding = tuple(r // 2 if padding == "same" else 0 for r in reach)
            structure = GroupStructure.build(kernels.shape[1], len(kernels), groups)
            spec = ConvSpec(structure, layer.kernel_size, conv.stride, padding, conv.dilation, "relu")  # type: ignore[arg-type]
            self._known[key] = self.price(spec, layer.input_hw)
        return self._known[key]


def _slope(a: Point, b: Point) -> float:
    return (b.lost - a.lost) / (b.saved - a.saved)
