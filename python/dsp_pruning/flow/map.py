"""How channels pass from tensor to tensor, and which channels can only be kept or removed together.

What each operation does to channels is in ``dsp_kernels/graph/operations/table.py``.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsp_kernels.graph.network import TracedNetwork
from dsp_kernels.graph.operations.entry import TracedNode
from dsp_pruning.flow.kernels import groups_of

# Channels of one tensor that are tied, pair by pair, to those of another.
_Tie = tuple[str, Tensor, str, Tensor]


@dataclass(frozen=True, eq=False)
class Link:
    """Channel ``source_index[i]`` of the tensor ``source`` goes into channel ``index[i]`` of the output."""

    source: str
    source_index: Tensor
    index: Tensor


class ChannelMap:
    """Links of a traced network.

    links: node name -> its links; () for layers, inputs, parameters and barriers.
    layers: names of convolutions and linear layers, which mix channels by a matrix of kernels.
    fixed: node name -> why its inputs and output keep all channels: a barrier, which has no links, because
        its channels cannot be followed; another one because the model's code names their number.
    """

    def __init__(self, network: TracedNetwork) -> None:
        self.network = network
        self.links: dict[str, tuple[Link, ...]] = {}
        self.layers = {node.name for node in network if node.operation.channels == "mixed"}
        self.fixed: dict[str, str] = {}
        for node in network:
            if node.kind == "scalar":
                continue
            links = self._links(node)
            self.links[node.name] = links or ()
            if links is None:
                reason, what = node.operation.reason, node.describe()
                self.fixed[node.name] = f"{what} {reason}" if reason else f"pack does not support {what}"
            elif node.attributes.get("rigid"):
                self.fixed[node.name] = f"the model's code has the width of {node.describe()} as a literal"

    def size_sources(self, node: TracedNode) -> set[str]:
        """Tensors that a node reads, including those of which it reads only the sizes."""
        found: set[str] = set()
        waiting = list(node.inputs)
        while waiting:
            name = waiting.pop()
            if self.network[name].kind == "scalar":
                waiting.extend(self.network[name].inputs)
            else:
                found.add(name)
        return found

    def ties(self, node: TracedNode) -> list[_Tie]:
        """Channels tied by a node: those of its links, those of one group, and parts taken as equal."""
        ties = [(link.source, link.source_index, node.name, link.index) for link in self.links[node.name]]
        parts = node.attributes.get("parts")
        if parts and ties:
            source = node.operands[0]
            channels = torch.arange(self.network[source].width)
            ties.append((source, channels[: len(channels) // parts].repeat(parts), source, channels))
        if groups_of(node.module) > 1 and node.name in self.layers:  # it loses whole groups
            source = node.inputs[0]
            first = torch.arange(self.network[source].width).view(groups_of(node.module), -1)[:, :1]
            for name in (source, node.name):
                channels = torch.arange(self.network[name].width)
                leaders = first.expand(-1, len(channels) // len(first)).flatten()
                ties.append((source, leaders, name, channels))
        return ties

    def _links(self, node: TracedNode) -> tuple[Link, ...] | None:
        """None if the channels cannot be followed."""
        how, every = node.operation.channels, torch.arange(node.width)
        if how in ("new", "mixed"):
            return ()
        widths = [self.network[name].width for name in node.operands]
        if how == "barrier" or not widths:
            return None
        if how == "joined":
            places = zip(node.operands, every.split(widths), strict=True)
            return tuple(Link(name, place - place[0], place) for name, place in places)
        if how == "index":
            first, *others = node.operands  # the others hold the index
            links = (Link(first, index, every) for index in node.attributes["index"])
            return (*links, *(Link(name, every, every) for name in others))
        if set(widths) != {node.width}:
            return None
        return tuple(Link(name, every, every) for name in node.operands)


def tied_and_kept(
    channel_map: ChannelMap, needed: Mapping[str, Tensor], shared: list[list[str]]
) -> dict[str, Tensor]:
    """Node name -> [channels] bool: what stays. A channel is removed when no channel tied to it is needed.

    Residual streams, concatenations, gates and depthwise convolutions all shrink by this rule.
    needed: node name -> [channels] bool, the channels that this tensor needs.
    shared: lists of nodes that run one module or read one parameter; their inputs and outputs are tied.
    """
    network = channel_map.network
    start, total = {}, 0
    for name in needed:
        start[name] = total
        total += network[name].width
    ties: list[_Tie] = []
    for node in network:
        if node.name in start:
            ties += channel_map.ties(node)
    for first, *others in shared:
        for other in others:
            inputs = zip(network[first].inputs[:1], network[other].inputs[:1], strict=True)
            for a, b in ((first, other), *inputs):
                every = torch.arange(network[a].width)
                ties.append((a, every, b, every))
    none = torch.zeros(0, dtype=torch.long)
    left = torch.cat([none, *(channels + start[name] for name, channels, _, _ in ties)])
    right = torch.cat([none, *(channels + start[name] for _, _, name, channels in ties)])
    space = _components(total, left, right)
    kept = torch.zeros(total, dtype=torch.bool)
    if total:
        kept[space[torch.cat(list(needed.values()))]] = True
    for name, first_channel in start.items():  # one channel remains, needed or not: no module of width 0
        own = space[first_channel : first_channel + network[name].width]
        if len(own) and not kept[own].any():
            kept[own[0]] = True
    parts = kept[space].split([network[name].width for name in start])
    return dict(zip(start, parts, strict=True))


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
