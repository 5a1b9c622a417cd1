"""What the planner reads off nodes that move, combine or rescale whole channels (``trace_layout``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from dsp_kernels.trace import TracedNetwork, TracedNode

__all__ = ["BatchedNodes", "gate_of", "pool_size", "selected_channels", "splits_into_pieces"]

_GATE_FUNCTIONS = {
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    F.hardsigmoid: "hardsigmoid",
}


class BatchedNodes:
    """The nodes that depend on the network's input: their batch is the input's."""

    def __init__(self, network: TracedNetwork) -> None:
        self._network = network
        self._names: set[str] = set()
        for node in network:
            if node.kind == "input" or self._names.intersection(node.inputs):
                self._names.add(node.name)

    def all_images(self, names: Sequence[str]) -> bool:
        """Whether all are tensors with the batch of the input and one number of axes."""
        shapes = [self._network[name].shape for name in names]
        return self._names.issuperset(names) and len({len(shape) for shape in shapes if shape}) == 1

    def can_multiply(self, left: str, right: str) -> bool:
        """Whether the two have one shape, or one is a single pixel per channel."""
        a, b = self._network[left].shape, self._network[right].shape
        if a is None or b is None or not self.all_images((left, right)) or a[:2] != b[:2]:
            return False
        return a == b or (len(a) == 4 and (1, 1) in (a[2:], b[2:]))


def gate_of(node: TracedNode) -> str | None:
    """The name in ``activations.GATES`` of an elementwise node, or None."""
    if node.module is not None:
        kinds = {nn.Sigmoid.forward: "sigmoid", nn.Hardsigmoid.forward: "hardsigmoid"}
        return kinds.get(type(node.module).forward)
    return _GATE_FUNCTIONS.get(node.fx_node.target)


def splits_into_pieces(network: TracedNetwork, node: TracedNode) -> bool:
    """Whether all that reads a split is a choice of one of its parts."""
    return all(network[user].kind == "piece" for user in node.users)


def selected_channels(network: TracedNetwork, node: TracedNode) -> tuple[str, tuple[int, ...]] | None:
    """The node whose channels a piece or a shuffle holds, and which in which order; None if unknown."""
    source = network[node.inputs[0]]
    if node.kind == "piece":
        known = source.shape is not None or (source.kind == "split" and splits_into_pieces(network, source))
        index = tuple(range(node.attributes["start"], node.attributes["stop"]))
        return (source.name, index) if known and index else None
    if node.kind == "channel_shuffle":
        return source.name, _shuffled(source, node.attributes["groups"])
    # Channels into groups of channels, the two axes exchanged, and back.
    swapped = _before_identities(network, source)
    if swapped.kind != "swap_channels":
        return None
    split = _before_identities(network, network[swapped.inputs[0]])
    if split.kind != "split_channels":
        return None
    origin = network[split.inputs[0]]
    return origin.name, _shuffled(origin, split.attributes["groups"])


def pool_size(node: TracedNode) -> tuple[int, int] | None:
    """(height, width) that an adaptive average pool makes; None for another pool or a size that follows x."""
    if isinstance(node.module, nn.AdaptiveAvgPool2d):
        size = node.module.output_size
    elif node.fx_node.target is F.adaptive_avg_pool2d:
        args = node.fx_node.args
        size = args[1] if len(args) > 1 else node.fx_node.kwargs.get("output_size")  # type: ignore[assignment]
    else:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
    match pair:
        case (int(height), int(width)):
            return height, width
    return None


def _before_identities(network: TracedNetwork, node: TracedNode) -> TracedNode:
    while node.kind == "identity":
        node = network[node.inputs[0]]
    return node


def _shuffled(source: TracedNode, groups: int) -> tuple[int, ...]:
    assert source.shape is not None
    width = source.shape[1] // groups
    return tuple(group * width + place for place in range(width) for group in range(groups))
