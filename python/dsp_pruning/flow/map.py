"""How channels pass from tensor to tensor, and which channels can only be kept or removed together.

The channels of a tensor are its entries along dimension 1; so are the features after a flatten.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsp_kernels.graph.network import TracedNetwork, TracedNode

# Every channel of the output depends on the same channel of the inputs and on nothing else.
_CHANNELWISE = (
    *("batch_norm", "functional_norm", "instance_norm", "activation", "elementwise", "identity", "add"),
    "size_check",
    *("max_pool", "avg_pool", "global_avg_pool", "adaptive_pool", "pad", "interpolate", "spatial_mean"),
    *("combine", "split", "split_channels", "join_channels", "same_channels"),
)
_CONVOLUTIONS = ("conv", "packed_conv", "conv_transpose")

# Channels of one tensor that are tied, pair by pair, to those of another.
_Tie = tuple[str, Tensor, str, Tensor]


@dataclass(frozen=True, eq=False)
class Link:
    """Channel ``source_index[i]`` of the tensor ``source`` goes into channel ``index[i]`` of the output."""

    source: str
    source_index: Tensor
    index: Tensor


class ChannelMap:
    """Widths and links of a traced network.

    width: node name -> number of channels (features) of its output; 0 where it has none.
    links: node name -> its links, one per operand; () for layers, inputs and barriers.
    layers: names of convolutions and linear layers, which mix channels by a matrix of kernels.
    barriers: node name -> why its channels cannot be followed. It reads all channels of its inputs, and its
        inputs and output keep theirs.
    rigid: node name -> why its inputs and output have to keep their widths, although channels are followed.
    """

    def __init__(self, network: TracedNetwork) -> None:
        self.network = network
        self.width: dict[str, int] = {}
        self.links: dict[str, tuple[Link, ...]] = {}
        self.layers: set[str] = set()
        self.barriers: dict[str, str] = {}
        self.rigid: dict[str, str] = {}
        self._grids: dict[str, tuple[int, int]] = {}  # tensors whose channels are dimensions 1 and 2
        for node in network:
            if node.kind != "scalar":
                self._add(node)

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
        if node.name in self.barriers:
            return ties
        if node.kind == "split" and not node.attributes["rigid"]:
            ties.append(self._equal_parts(node.name, len(node.attributes["sizes"])))
        elif node.kind in ("split_channels", "channel_shuffle"):
            ties.append(self._equal_parts(node.inputs[0], node.attributes["groups"]))
        elif isinstance(node.module, nn.Conv2d) and node.module.groups > 1:  # it loses whole groups
            source = node.inputs[0]
            first = torch.arange(self.width[source]).view(node.module.groups, -1)[:, :1]
            for name in (source, node.name):
                channels = torch.arange(self.width[name])
                leaders = first.expand(-1, len(channels) // len(first)).flatten()
                ties.append((source, leaders, name, channels))
        return ties

    def _equal_parts(self, name: str, parts: int) -> _Tie:
        channels = torch.arange(self.width[name])
        return name, channels[: len(channels) // parts].repeat(parts), name, channels

    def _add(self, node: TracedNode) -> None:
        shape = node.shape
        self.width[node.name] = shape[1] if shape is not None and len(shape) > 1 else 0
        self.links[node.name] = ()
        if node.kind == "input" or node.fx_node.op == "output":
            return
        if _is_layer(node) and node.inputs[0] not in self._grids:
            self.layers.add(node.name)
            return
        links = self._channelwise(node) if node.kind in _CHANNELWISE else self._reordered(node)
        if links is None:
            self.barriers[node.name] = (
                f"{node.describe()} normalises over several channels together"
                if node.kind == "norm_over_channels"
                else f"pack does not support {node.describe()}"
            )
            return
        self.links[node.name] = links
        if node.attributes.get("rigid") or _hard_codes_width(node):
            self.rigid[node.name] = f"the model's code has the width of {node.describe()} as a literal"

    def _channelwise(self, node: TracedNode) -> tuple[Link, ...] | None:
        operands = node.attributes.get("operands") or node.inputs[:1]
        if node.kind == "add":
            operands = (node.inputs[0], node.inputs[-1])
        source = operands[0]
        grid = self._grids.get(source)
        width = self.width[source]
        if node.kind == "split_channels":
            groups = node.attributes["groups"]
            self._grids[node.name] = (groups, width // groups)
        elif node.kind == "identity" and grid:
            self._grids[node.name] = grid
        elif any((name in self._grids) != (node.kind == "join_channels") for name in operands):
            return None
        if node.kind == "split":
            if sum(node.attributes["sizes"]) != width:
                return None
        elif node.kind not in ("split_channels", "identity") and self.width[node.name] != width:
            return None
        self.width[node.name] = width
        every = torch.arange(width)
        return tuple(Link(name, every, every) for name in operands)

    def _reordered(self, node: TracedNode) -> tuple[Link, ...] | None:
        """Links of operations that renumber channels; None for an operation without a rule."""
        if not node.inputs:
            return None
        source, width = node.inputs[0], self.width[node.name]
        if node.kind == "swap_channels" and source in self._grids:
            first, second = self._grids[source]
            self._grids[node.name] = (second, first)
            self.width[node.name] = first * second
            order = torch.arange(first * second).view(first, second).T.flatten()
            return (Link(source, order, torch.arange(first * second)),)
        operands = node.attributes.get("operands", (source,))
        if any(name in self._grids or not self.width.get(name) for name in operands):
            return None
        every = torch.arange(width)
        if node.kind == "channel_shuffle":
            groups = node.attributes["groups"]
            return (Link(source, every.view(groups, -1).T.flatten(), every),)
        if node.kind == "flatten":
            return (Link(source, every // (width // self.width[source]), every),)
        if node.kind == "piece":
            start, stop = node.attributes["start"], node.attributes["stop"]
            return (Link(source, torch.arange(start, stop), every),)
        if node.kind == "concat":
            places = every.split([self.width[name] for name in operands])
            return tuple(
                Link(name, place - place[0], place) for name, place in zip(operands, places, strict=True)
            )
        return None


def tied_and_kept(
    channel_map: ChannelMap, needed: Mapping[str, Tensor], shared: list[list[str]]
) -> dict[str, Tensor]:
    """Node name -> [channels] bool: what stays. A channel is removed when no channel tied to it is needed.

    Residual streams, concatenations, gates and depthwise convolutions all shrink by this rule.
    needed: node name -> [channels] bool, the channels that this tensor needs.
    shared: lists of nodes that run one module; their inputs and outputs are tied.
    """
    start, total = {}, 0
    for name in needed:
        start[name] = total
        total += channel_map.width[name]
    ties: list[_Tie] = []
    for node in channel_map.network:
        if node.name in start:
            ties += channel_map.ties(node)
    for first, *others in shared:
        for other in others:
            inputs = (channel_map.network[name].inputs[0] for name in (first, other))
            for a, b in ((first, other), tuple(inputs)):
                every = torch.arange(channel_map.width[a])
                ties.append((a, every, b, every))
    none = torch.zeros(0, dtype=torch.long)
    space = _components(
        total,
        torch.cat([none, *(channels + start[name] for name, channels, _, _ in ties)]),
        torch.cat([none, *(channels + start[name] for _, _, name, channels in ties)]),
    )
    kept = torch.zeros(total, dtype=torch.bool)
    if total:
        kept[space[torch.cat(list(needed.values()))]] = True
    for name, first_channel in start.items():  # one channel remains, needed or not: no module of width 0
        own = space[first_channel : first_channel + channel_map.width[name]]
        if len(own) and not kept[own].any():
            kept[own[0]] = True
    parts = kept[space].split([channel_map.width[name] for name in start])
    return dict(zip(start, parts, strict=True))


def norm_of(node: TracedNode) -> nn.Module:
    """The module that holds a norm's parameters, wherever it is called."""
    held = node.attributes.get("module", node.module)
    assert isinstance(held, nn.Module)
    return held


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


def _is_layer(node: TracedNode) -> bool:
    if node.shape is None:
        return False
    if node.kind == "linear":  # of (batch, features); along any other axis it mixes no channels
        return len(node.shape) == 2
    return node.kind in _CONVOLUTIONS and len(node.shape) == 4


def _hard_codes_width(node: TracedNode) -> bool:
    """Whether the number of features is a literal in the model's code, as in ``view(-1, 512)``."""
    if node.kind != "flatten" or node.fx_node.target in (torch.flatten, "flatten"):
        return False
    asked: list[Any] = []
    fx.node.map_aggregate((node.fx_node.args[1:], dict(node.fx_node.kwargs)), asked.append)
    return any(isinstance(size, int) and size > 1 for size in asked)
