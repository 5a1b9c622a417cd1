"""The search for the threshold beta that prunes a network to a rate."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch

from dsp_kernels.errors import DSPPruningError
from dsp_kernels.graph.network import TracedNetwork
from dsp_pruning.flow.channels import channel_flow
from dsp_pruning.layers import LayerInfo
from dsp_pruning.prune.rule import LayerRule, Masks, candidate_betas

# What a rate is a share of: multiply-adds, weights, predicted time.
Counted = Literal["macs", "params"]
Target = Literal[Counted, "time"]

_GUESSES = 3  # by the rule alone, before the actual search


def pruned_share(layers: Sequence[LayerInfo], masks: Masks, target: Counted) -> float:
    """Share of the layers' cost that these masks prune, 0 to 1."""
    whole = gone = 0
    for layer in layers:
        cost = layer.kernel_macs if target == "macs" else math.prod(layer.kernel_size)
        mask = masks[layer.name]
        whole += cost * mask.numel()
        gone += cost * (mask.numel() - int(mask.sum()))
    return gone / whole


@dataclass(frozen=True, eq=False)
class ThresholdSearch:
    """What each beta would leave of a network with fixed weights. It changes nothing.

    rules: one per layer, in order. network: None if the model cannot be traced.
    target: what a rate is a share of. multiple: each group keeps a multiple of this many channels.
    """

    layers: Sequence[LayerInfo]
    rules: Sequence[LayerRule]
    network: TracedNetwork | None
    target: Counted
    multiple: int = 1
    _outcomes: dict[int, tuple[float, bool]] = field(default_factory=dict, init=False)
    _by_rule_alone: dict[int, float] = field(default_factory=dict, init=False)

    @cached_property
    def betas(self) -> list[float]:
        return candidate_betas(
            shares for rule in self.rules for shares in (rule.channels, rule.filters) if shares is not None
        )

    def masks(self, beta: float) -> tuple[Masks, bool]:
        """The masks at beta without dead kernels, and whether the output still depends on the input."""
        if self.multiple == 1:
            return self.without_dead({rule.name: rule.mask(beta) for rule in self.rules})
        # A dead channel does not count towards a multiple: another one takes its place.
        barred = {rule.name: ~rule.columns(rule.alive) for rule in self.rules}
        while True:
            chosen = {
                rule.name: rule.mask(beta, None, self.multiple, barred[rule.name]) for rule in self.rules
            }
            live, connected = self.without_dead(chosen)
            more = False
            for rule in self.rules:
                lost = rule.columns(chosen[rule.name]) & ~rule.columns(live[rule.name])
                barred[rule.name] = barred[rule.name] | lost
                more |= bool(lost.any())
            if not more:
                return live, connected

    def without_dead(self, masks: Masks) -> tuple[Masks, bool]:
        """Remove kernels that read nothing or are read by nothing, in any call of their layer."""
        if self.network is None:
            return masks, True
        flow = channel_flow(self.network, masks, "pruning")
        live = dict(masks)
        for name in masks:
            calls = [
                flow.kernels[node.name] for node in self.network.calls(name) if node.name in flow.kernels
            ]
            if calls:
                live[name] = torch.stack(calls).any(0)
        return live, flow.connected

    def pruned(self, masks: Masks) -> float:
        """Share of the target's cost that these masks prune, 0 to 1."""
        return pruned_share(self.layers, masks, self.target)

    def pruned_energy(self, masks: Masks) -> float:
        """Share of the layers' sum of squared weights that these masks prune, 0 to 1."""
        whole = sum(float(rule.energy.sum()) for rule in self.rules)
        kept = sum(float(rule.energy[masks[rule.name]].sum()) for rule in self.rules)
        return 1 - kept / whole if whole else 0.0

    def reachable(self) -> tuple[float, float] | None:
        """Smallest and largest share that can be pruned; None if the output is constant at every beta."""
        cut = bisect_left(range(len(self.betas)), True, key=lambda index: not self._outcome(index)[1])
        return (self._outcome(0)[0], self._outcome(cut - 1)[0]) if cut else None

    def chosen(self, rate: float) -> tuple[Masks, float]:
        """The masks that prune at least ``rate``, and their beta."""
        beta = self.best(rate)
        return self.masks(beta)[0], beta

    def best(self, rate: float) -> float:
        """The smallest beta that prunes at least ``rate``, 0 to 1."""
        # Both the pruned share and whether the network is cut in two are monotone in beta.
        found = self._first_pruning(rate)
        if rate < 1 and found < len(self.betas) and self._outcome(found)[1]:
            return self.betas[found]
        span = self.reachable()
        reach = "none: all is zero" if span is None else f"0 to {math.floor(span[1] * 1e6) / 1e6}"
        raise DSPPruningError(
            f"pruning rate {rate} is out of reach for the {len(self.rules)} chosen layers with these "
            f"weights, groups and filter layers; within reach: {reach}"
        )

    def _first_pruning(self, rate: float) -> int:
        """The first candidate that prunes at least ``rate``; the number of candidates if none does.

        Channel flow costs far more than the rule of each layer, and what it adds changes slowly with beta. So
        the rule alone, corrected by the outcomes so far, guesses where to look.
        """
        low, high, added = -1, len(self.betas), 0.0  # low prunes less than the rate, high at least the rate
        for _ in range(_GUESSES):
            if high - low == 1:
                break
            by_rule = bisect_left(range(len(self.betas) - 1), rate - added, key=self._by_rule)
            guess = min(max(by_rule, low + 1), high - 1)
            share = self._outcome(guess)[0]
            added = share - self._by_rule(guess)
            low, high = (low, guess) if share >= rate else (guess, high)
        step = 1
        while high - low > 1:  # in growing steps from the last guess, then by bisection
            middle = (low + high) // 2
            probe = max(high - step, middle) if high < len(self.betas) else min(low + step, middle)
            low, high = (low, probe) if self._outcome(probe)[0] >= rate else (probe, high)
            step *= 4
        return high

    def _by_rule(self, index: int) -> float:
        """Share pruned at this candidate without removing dead kernels."""
        if index not in self._by_rule_alone:
            chosen = {rule.name: rule.mask(self.betas[index]) for rule in self.rules}
            self._by_rule_alone[index] = self.pruned(chosen)
        return self._by_rule_alone[index]

    def _outcome(self, index: int) -> tuple[float, bool]:
        """Share pruned at this candidate, and whether the output still depends on the input."""
        if index not in self._outcomes:
            masks, connected = self.masks(self.betas[index])
            self._outcomes[index] = self.pruned(masks), connected
        return self._outcomes[index]
