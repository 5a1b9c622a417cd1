"""The search for the one threshold beta that prunes a network to a rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dsp_kernels.errors import DSPPruningError
from dsp_kernels.graph.network import TracedNetwork
from dsp_pruning.flow.channels import channel_flow
from dsp_pruning.layers import LayerInfo
from dsp_pruning.prune.rule import LayerRule, Masks, Target, candidate_betas, first_reaching, kernel_costs

__all__ = ["ThresholdSearch", "without_dead"]


_GUESSES = 3  # by the rule alone, before the search proper


class ThresholdSearch:
    """What each beta would leave of a network whose weights stay as they are. It changes nothing.

    rules: one per layer. network: the traced network, None where it cannot be traced.
    target: what a rate is a share of. multiple: each group keeps a multiple of so many channels.
    """

    def __init__(
        self,
        layers: Sequence[LayerInfo],
        rules: Sequence[LayerRule],
        network: TracedNetwork | None,
        target: Target = "macs",
        multiple: int = 1,
    ) -> None:
        self.rules = rules
        self.network = network
        self.target = target
        self.multiple = multiple
        self.betas = candidate_betas(shares for rule in rules for shares in rule.shares)
        self._costs = kernel_costs(layers, target)
        self._whole = sum(
            cost * next(r for r in rules if r.name == n).alive.numel() for n, cost in self._costs.items()
        )
        self._seen: dict[int, tuple[float, bool]] = {}
        self._by_rule_seen: dict[int, float] = {}

    def masks(self, beta: float) -> tuple[Masks, bool]:
        """The masks at beta without kernels that carry nothing, to the fixpoint; whether a path is left."""
        # A channel that turns out dead cannot count towards a multiple: another one takes its place.
        barred = {rule.name: ~rule.columns(rule.alive) for rule in self.rules}
        while True:
            chosen = {rule.name: rule.mask(beta, self.multiple, barred[rule.name]) for rule in self.rules}
            live, connected = without_dead(chosen, self.network)
            if self.multiple == 1:
                return live, connected
            grown = False
            for rule in self.rules:
                lost = rule.columns(chosen[rule.name]) & ~rule.columns(live[rule.name])
                barred[rule.name] = barred[rule.name] | lost
                grown |= bool(lost.any())
            if not grown:
                return live, connected

    def pruned(self, masks: Masks) -> float:
        """Share of the target's cost that these masks prune, 0..1."""
        kept = sum(cost * int(masks[name].sum()) for name, cost in self._costs.items())
        return (self._whole - kept) / self._whole

    def pruned_energy(self, masks: Masks) -> float:
        """Share of the layers' sum of squares that these masks prune, 0..1."""
        whole = sum(float(rule.energy.sum()) for rule in self.rules)
        kept = sum(float(rule.energy[masks[rule.name]].sum()) for rule in self.rules)
        return 1 - kept / whole if whole else 0.0

    def reachable(self) -> tuple[float, float] | None:
        """The smallest and the largest share that can be pruned; None if no path is left at any beta."""
        last = first_reaching(lambda index: not self._outcome(index)[1], len(self.betas)) - 1
        if last < 0:
            return None
        return self._outcome(0)[0], self._outcome(last)[0]

    def best(self, rate: float) -> float:
        """The smallest beta that prunes at least ``rate``, 0..1.

        Raises DSPPruningError for a rate that cannot be reached, with the range that can.
        """
        # Both only grow with beta: what is pruned, and whether the network has been cut in two.
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
        """The first candidate that prunes at least ``rate``, their number if none does.

        Following channels through the network costs far more than the rule of each layer, and what it adds
        changes slowly with beta. So the rule alone, corrected by what was seen, says where to look.
        """
        low, high, added = -1, len(self.betas), 0.0  # low falls short, high reaches the rate
        for _ in range(_GUESSES):
            if high - low == 1:
                break
            guess = min(max(self._first_by_rule(rate - added), low + 1), high - 1)
            share = self._outcome(guess)[0]
            added = share - self._by_rule(guess)
            low, high = (low, guess) if share >= rate else (guess, high)
        step = 1
        while high - low > 1:  # from where the guesses ended, in growing steps, then by halves
            middle = (low + high) // 2
            probe = max(high - step, middle) if high < len(self.betas) else min(low + step, middle)
            low, high = (low, probe) if self._outcome(probe)[0] >= rate else (probe, high)
            step *= 4
        return high

    def _first_by_rule(self, share: float) -> int:
        return first_reaching(lambda index: self._by_rule(index) >= share, len(self.betas) - 1)

    def _by_rule(self, index: int) -> float:
        """Share pruned at this candidate before dead kernels are looked for."""
        if index not in self._by_rule_seen:
            chosen = {rule.name: rule.mask(self.betas[index]) for rule in self.rules}
            self._by_rule_seen[index] = self.pruned(chosen)
        return self._by_rule_seen[index]

    def _outcome(self, index: int) -> tuple[float, bool]:
        """Share pruned at this candidate, and whether the output still depends on the input."""
        if index not in self._seen:
            masks, connected = self.masks(self.betas[index])
            self._seen[index] = self.pruned(masks), connected
        return self._seen[index]


def without_dead(masks: Masks, network: TracedNetwork | None) -> tuple[Masks, bool]:
    """The masks without kernels that carry nothing; whether the output still depends on the input.

    A conv that runs more than once keeps what any of its runs needs. A layer that the traced network does
    not call, or every layer where there is none, keeps its own mask.
    """
    if network is None:
        return masks, True
    live = dict(masks)
    flow = channel_flow(network, live, "pruning")
    for name in masks:
        runs = [flow.kernels[node.name] for node in network.calls(name) if node.name in flow.kernels]
        if runs:
            live[name] = torch.stack(runs).any(0)
    return live, flow.connected
