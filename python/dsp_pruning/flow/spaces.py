"""Spaces: channels of several values that stay or go together, and which of them stay.

A channel leaves if every channel tied to it can be spared; so residual streams, concatenations, gates and
depthwise convolutions shrink by one rule.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsp_kernels.graph.network import TracedNetwork
from dsp_pruning.flow.map import ChannelMap

__all__ = ["Spaces"]


class Spaces:
    """The channels of a network, tied by its wires, by groups of convolutions and by modules that run twice.

    must: node name -> [channels] bool, the channels that its value cannot spare.
    shared: lists of nodes that run one module.
    """

    def __init__(
        self,
        network: TracedNetwork,
        paths: ChannelMap,
        must: Mapping[str, Tensor],
        shared: list[list[str]],
    ) -> None:
        self._start: dict[str, int] = {}
        self._width = paths.width
        total = 0
        for name in must:
            self._start[name] = total
            total += paths.width[name]
        label = _components(total, *self._edges(network, paths, shared))
        kept = torch.zeros(total, dtype=torch.bool)
        if total:
            kept[label[torch.cat(list(must.values()))]] = True
        for (
            name,
            start,
        ) in self._start.items():  # every module stays legal: one channel, needed or not, remains
            own = label[start : start + paths.width[name]]
            if len(own) and not kept[own].any():
                kept[own[0]] = True
        self._kept = kept[label]

    def keep(self, name: str) -> Tensor:
        """[channels or features] bool of a node's value: what stays."""
        return self._kept[self._start[name] : self._start[name] + self._width[name]]

    def _edges(
        self, network: TracedNetwork, paths: ChannelMap, shared: list[list[str]]
    ) -> tuple[Tensor, Tensor]:
        left, right = [torch.zeros(0, dtype=torch.long)], [torch.zeros(0, dtype=torch.long)]

        def tie(a: str, channels_a: Tensor, b: str, channels_b: Tensor) -> None:
            left.append(channels_a + self._start[a])
            right.append(channels_b + self._start[b])

        for node in network:
            if node.name not in self._start:
                continue
            for wire in paths.wires[node.name]:
                tie(wire.source, wire.source_index, node.name, wire.index)
            for pair in paths.ties(node):
                tie(*pair)
        for first, *others in shared:
            for other in others:
                for a, b in ((first, other), (network[first].inputs[0], network[other].inputs[0])):
                    every = torch.arange(self._width[a])
                    tie(a, every, b, every)
        return torch.cat(left), torch.cat(right)


def _components(total: int, left: Tensor, right: Tensor) -> Tensor:
    """[total]: for every element the smallest one that the pairs (left, right) connect it with."""
    label = torch.arange(total)
    while True:
        low = torch.minimum(label[left], label[right])
        new = label.scatter_reduce(0, label[left], low, "amin").scatter_reduce(0, label[right], low, "amin")
        while not torch.equal(new, new[new]):
            new = new[new]
        if torch.equal(new, label):
            return label
        label = new
