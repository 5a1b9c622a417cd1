"""Channel flow: which channels of every value in a traced network are constant, and which are ever read.

One pass forwards finds the constant channels, one pass backwards the channels that are read. On a graph
without cycles this is the fixpoint: a kernel dies only through a constant before it or a silence after it,
and both passes hand these on through the whole network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsp_kernels.graph.network import TracedNetwork
from dsp_pruning.flow.map import ChannelMap
from dsp_pruning.flow.rules import Rules, Semantics

__all__ = ["ChannelFlow", "ChannelState", "Semantics", "channel_flow"]


@dataclass(frozen=True, eq=False)
class ChannelState:
    """The channels of one value; on the CPU.

    constant: [channels] float64, the number that fills the whole map of this channel for every input; NaN
        where the channel varies (or is not known to be constant).
    read: [channels] bool, whether something needs it: a node that is alive reads it, or the output does.
        What only makes a channel that is zero anyway is not needed, such as the constant before a ReLU.
    """

    constant: Tensor
    read: Tensor

    @property
    def zero(self) -> Tensor:
        """[channels] bool: exactly zero for every input. False where the constant is another number."""
        return self.constant == 0

    @property
    def live(self) -> Tensor:
        """[channels] bool: neither zero nor unread. The other channels can be removed."""
        return self.read & ~self.zero


@dataclass(frozen=True, eq=False)
class ChannelFlow:
    """What ``channel_flow`` found.

    states: node name -> state of the value it makes, for every node that makes a tensor.
    kernels: node name -> [O, C / groups] bool for convolutions and linear layers: a kernel is alive if it is
        not zero, reads a channel that is not zero, and writes a channel that is neither zero nor unread.
    connected: whether the output still depends on the network's input.
    """

    states: Mapping[str, ChannelState]
    kernels: Mapping[str, Tensor]
    connected: bool

    def __getitem__(self, name: str) -> ChannelState:
        return self.states[name]


def channel_flow(
    network: TracedNetwork,
    masks: Mapping[str, Tensor] | None = None,
    semantics: Semantics = "eval",
    paths: ChannelMap | None = None,
) -> ChannelFlow:
    """Follow every channel of a traced network forwards and backwards.

    masks: path of a conv -> [O, C] (or [O, C, 1, 1]), nonzero where a kernel is kept.
    paths: the network's ChannelMap, if it exists already.

    semantics says what a parameter's value proves:

    - ``"eval"``: the network computes with the values it holds now, in eval mode. BN of a constant channel
      is the constant beta + (c - mean) * gamma / sqrt(var + eps), whatever its input if gamma = 0; a zero
      kernel is dead in every layer. This is what packing may rely on.
    - ``"pruning"``: training goes on, so only what a mask holds at zero is dead; every other kernel, BN
      channel and linear weight counts as in use. BN and the conv bias of a channel that nothing feeds count
      as 0, because the pruner clears them (golden README section 5, "BN channels with zero weight-gradient
      get weight=bias=0"). The pruner cannot clear a module that runs more than once for one of its runs.

    A kernel that reads a nonzero constant is alive: its share of the output would be lost. Zero-padding
    makes such a share vary at the border. An opaque node reads all that it is given, and all that it makes
    varies.
    Raises DSPShapeError if a mask does not fit its conv.
    """
    paths = ChannelMap(network) if paths is None else paths
    rules = Rules(paths, masks or {}, semantics)
    constants: dict[str, Tensor] = {}
    for node in network:
        if node.kind != "scalar":
            constants[node.name] = rules.constant(node, constants)
    reads = {name: torch.zeros_like(constant, dtype=torch.bool) for name, constant in constants.items()}
    kernels: dict[str, Tensor] = {}
    for node in reversed(network.nodes):
        if node.kind == "scalar":
            continue
        needed = reads[node.name]
        if not rules.runs_often(node):  # a kernel whose sum is 0 in one run may be needed to make that 0
            needed = needed & (constants[node.name] != 0)
        if node.name in paths.readers:
            kernels[node.name] = rules.kernels(node, constants[node.inputs[0]], needed)
        for name, read in rules.read(node, needed, kernels.get(node.name)).items():
            reads[name] |= read
    states = {
        node.name: ChannelState(constants[node.name], reads[node.name])
        for node in network
        if node.kind != "scalar" and node.fx_node.op != "output"
    }
    connected = any(bool(reads[node.name].any()) for node in network.of_kind("input"))
    return ChannelFlow(states, kernels, connected)
