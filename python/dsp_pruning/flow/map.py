"""How channels go from value to value: which channel of its inputs an operation hands to each of its outputs.

Channels of a value are numbered along dimension 1; features after a flatten likewise. What a value has along
its other dimensions does not matter here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsp_kernels.graph.network import TracedNetwork, TracedNode

__all__ = ["ChannelMap", "Wire", "norm_of"]

# Every channel of the output depends on the same channel of the input and on nothing else.
_STRAIGHT = (
    *("batch_norm", "functional_norm", "instance_norm", "activation", "elementwise", "identity", "add"),
    "size_check",
    *("max_pool", "avg_pool", "global_avg_pool", "adaptive_pool", "pad", "interpolate", "spatial_mean"),
    *("combine", "split", "split_channels", "join_channels", "same_channels"),
)
_READERS = ("conv", "packed_conv", "conv_transpose")


@dataclass(frozen=True, eq=False)
class Wire:
    """Channel ``source_index[i]`` of the value ``source`` goes into channel ``index[i]`` of the output."""

    source: str
    source_index: Tensor
    index: Tensor


class ChannelMap:
    """Widths and wires of a traced network.

    width: node name -> number of channels (features) of its value; 0 where it has none.
    wires: node name -> its wires, one per operand; () for readers, inputs and barriers.
    readers: names of nodes in which a matrix of kernels leads from input to output channels.
    barriers: node name -> why its channels cannot be followed: it reads all it is given, and all that it
        makes has to stay.
    rigid: node name -> why the widths of its input and output have to stay, although channels are followed.
    """

    def __init__(self, network: TracedNetwork) -> None:
        self.network = network
        self.width: dict[str, int] = {}
        self.wires: dict[str, tuple[Wire, ...]] = {}
        self.readers: set[str] = set()
        self.barriers: dict[str, str] = {}
        self.rigid: dict[str, str] = {}
        self._groups: dict[str, tuple[int, int]] = {}  # values whose channels are a grid of dimensions 1, 2
        for node in network:
            if node.kind != "scalar":
                self._add(node)

    def size_sources(self, node: TracedNode) -> set[str]:
        """Tensors that a node reads, also those of which it only reads the sizes."""
        found: set[str] = set()
        waiting = list(node.inputs)
        while waiting:
            name = waiting.pop()
            if self.network[name].kind == "scalar":
                waiting.extend(self.network[name].inputs)
            else:
                found.add(name)
        return found

    def _add(self, node: TracedNode) -> None:
        shape = node.shape
        self.width[node.name] = shape[1] if shape is not None and len(shape) > 1 else 0
        self.wires[node.name] = ()
        if node.kind == "input" or node.fx_node.op == "output":
            return
        if _is_reader(node) and node.inputs[0] not in self._groups:
            self.readers.add(node.name)
            return
        wires = self._straight(node) if node.kind in _STRAIGHT else self._moved(node)
        if wires is None:
            self.barriers[node.name] = (
                f"{node.describe()} normalises over several channels together"
                if node.kind == "norm_over_channels"
                else f"packing does not know how channels pass {node.describe()}"
            )
            return
        self.wires[node.name] = wires
        if node.attributes.get("rigid") or _names_features(node):
            self.rigid[node.name] = f"{node.describe()} names its number of channels in the model's code"

    def _straight(self, node: TracedNode) -> tuple[Wire, ...] | None:
        operands = node.attributes.get("operands") or node.inputs[:1]
        if node.kind == "add":
            operands = (node.inputs[0], node.inputs[-1])
        source = operands[0]
        grid = self._groups.get(source)
        width = self.width[source]
        if node.kind == "split_channels":
            groups = node.attributes["groups"]
            self._groups[node.name] = (groups, width // groups)
        elif node.kind == "identity" and grid:
            self._groups[node.name] = grid
        elif any((name in self._groups) != (node.kind == "join_channels") for name in operands):
            return None
        if node.kind == "split":
            shown = sum(node.attributes["sizes"])
            if shown != width:
                return None
        elif node.kind not in ("split_channels", "identity") and self.width[node.name] != width:
            return None
        self.width[node.name] = width
        every = torch.arange(width)
        return tuple(Wire(name, every, every) for name in operands)

    def _moved(self, node: TracedNode) -> tuple[Wire, ...] | None:
        """Wires of operations that renumber channels; None for one that is not known."""
        if not node.inputs:
            return None
        source, width = node.inputs[0], self.width[node.name]
        if node.kind == "swap_channels" and source in self._groups:
            first, second = self._groups[source]
            self._groups[node.name] = (second, first)
            self.width[node.name] = first * second
            order = torch.arange(first * second).view(first, second).T.flatten()
            return (Wire(source, order, torch.arange(first * second)),)
        operands = node.attributes.get("operands", (source,))
        if any(name in self._groups or not self.width.get(name) for name in operands):
            return None
        every = torch.arange(width)
        if node.kind == "channel_shuffle":
            groups = node.attributes["groups"]
            return (Wire(source, every.view(groups, -1).T.flatten(), every),)
        if node.kind == "flatten":
            return (Wire(source, every // (width // self.width[source]), every),)
        if node.kind == "piece":
            start, stop = node.attributes["start"], node.attributes["stop"]
            return (Wire(source, torch.arange(start, stop), every),)
        if node.kind == "concat":
            wires, place = [], 0
            for name in operands:
                part = torch.arange(self.width[name])
                wires.append(Wire(name, part, part + place))
                place += len(part)
            return tuple(wires)
        return None

    def ties(self, node: TracedNode) -> list[tuple[str, Tensor, str, Tensor]]:
        """Pairs of channels (value, channels, value, channels) that stay or go together because of a node.

        Not those of wires: a conv with groups loses whole groups; parts that code takes as equal stay equal.
        """
        if node.kind == "split" and not node.attributes["rigid"]:
            return self._equal_parts(node.name, len(node.attributes["sizes"]))
        if node.kind in ("split_channels", "channel_shuffle") and node.name not in self.barriers:
            return self._equal_parts(node.inputs[0], node.attributes["groups"])
        if not isinstance(node.module, nn.Conv2d) or node.module.groups == 1:
            return []
        groups = node.module.groups
        into = torch.arange(self.width[node.inputs[0]]).view(groups, -1)
        out = torch.arange(self.width[node.name]).view(groups, -1)
        source = node.inputs[0]
        pairs = [
            (source, into[:, :1].expand_as(part).flatten(), name, part.flatten())
            for name, part in ((source, into), (node.name, out))
        ]
        return pairs

    def _equal_parts(self, name: str, parts: int) -> list[tuple[str, Tensor, str, Tensor]]:
        grid = torch.arange(self.width[name]).view(parts, -1)
        return [(name, grid[:1].expand_as(grid).flatten(), name, grid.flatten())]


def norm_of(node: TracedNode) -> nn.Module:
    """The module that holds a norm's parameters, wherever it is called."""
    held = node.attributes.get("module", node.module)
    assert isinstance(held, nn.Module)
    return held


def _is_reader(node: TracedNode) -> bool:
    """Whether a matrix of kernels leads from its input channels to its output channels."""
    if node.shape is None:
        return False
    if node.kind == "linear":  # of (batch, features); along any other axis it mixes no channels
        return len(node.shape) == 2
    return node.kind in _READERS and len(node.shape) == 4


def _names_features(node: TracedNode) -> bool:
    """view(-1, 512): the number of features is written into the model's own code."""
    if node.kind != "flatten" or node.fx_node.target in (torch.flatten, "flatten"):
        return False
    asked: list[Any] = []
    fx.node.map_aggregate((node.fx_node.args[1:], dict(node.fx_node.kwargs)), asked.append)
    return any(isinstance(size, int) and size > 1 for size in asked)
