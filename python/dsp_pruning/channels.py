"""Channel flow: which channels of every value in a traced network are constant, and which are ever read.

One pass forwards finds the constant channels, one pass backwards the channels that are read. On a graph
without cycles this is the fixpoint: a kernel dies only through a constant before it or a silence after it,
and both passes hand these on through the whole network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from dsp_kernels.activations import activate
from dsp_kernels.errors import DSPShapeError
from dsp_kernels.packed import PackedConv2d
from dsp_kernels.trace import TracedNetwork, TracedNode

__all__ = ["ChannelFlow", "ChannelState", "Semantics", "channel_flow"]

Semantics = Literal["eval", "pruning"]

_UNCHANGED = ("max_pool", "global_avg_pool", "identity", "output")
_CHANNEL_BY_CHANNEL = ("activation", "identity", "add", "max_pool", "avg_pool", "global_avg_pool")


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
    kernels: node name -> [O, C] bool for conv, packed_conv and linear nodes: a kernel is alive if it is not
        zero, reads a channel that is not zero, and writes a channel that is neither zero nor unread.
    connected: whether the output still depends on the network's input.
    """

    states: Mapping[str, ChannelState]
    kernels: Mapping[str, Tensor]
    connected: bool

    def __getitem__(self, name: str) -> ChannelState:
        return self.states[name]


def channel_flow(
    network: TracedNetwork, masks: Mapping[str, Tensor] | None = None, semantics: Semantics = "eval"
) -> ChannelFlow:
    """Follow every channel of a traced network forwards and backwards.

    masks: path of a conv -> [O, C] (or [O, C, 1, 1]), nonzero where a kernel is kept.

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
    rules = _Rules(network, masks or {}, semantics)
    constants: dict[str, Tensor] = {}
    for node in network:
        if node.kind != "scalar":
            constants[node.name] = rules.constant(node, [constants[i] for i in node.inputs if i in constants])
    reads = {name: torch.zeros_like(constant, dtype=torch.bool) for name, constant in constants.items()}
    kernels: dict[str, Tensor] = {}
    for node in reversed(network.nodes):
        if node.kind == "scalar":
            continue
        needed = reads[node.name] & (constants[node.name] != 0)
        if rules.is_reader(node):
            kernels[node.name] = rules.kernels(node, constants[node.inputs[0]], needed)
        for name in node.inputs:
            if name in reads:
                reads[name] |= rules.read(node, needed, reads[name], kernels.get(node.name))
    states = {
        node.name: ChannelState(constants[node.name], reads[node.name])
        for node in network
        if node.kind not in ("scalar", "output")
    }
    connected = any(bool(reads[node.name].any()) for node in network.of_kind("input"))
    return ChannelFlow(states, kernels, connected)


class _Rules:
    """What each kind of node does to a constant channel, and which of its input channels it reads."""

    def __init__(self, network: TracedNetwork, masks: Mapping[str, Tensor], semantics: Semantics) -> None:
        self.network = network
        self.masks = masks
        self.values = semantics == "eval"  # whether the values of parameters count
        self._in_use: dict[str, Tensor] = {}

    @staticmethod
    def is_reader(node: TracedNode) -> bool:
        """Whether a matrix of kernels leads from its input channels to its output channels."""
        if node.kind == "linear":  # of (batch, features); along any other axis it mixes no channels
            return node.shape is not None and len(node.shape) == 2
        return node.kind in ("conv", "packed_conv")

    def constant(self, node: TracedNode, inputs: list[Tensor]) -> Tensor:
        """[channels] float64 of the value that ``node`` makes."""
        if self.is_reader(node):
            return self._convolved(node, inputs[0]) if self.values else self._trained(node, inputs[0])
        if node.kind == "batch_norm":
            return self._normalised(node, inputs[0])
        if node.kind == "activation":
            return torch.where(inputs[0].isnan(), inputs[0], activate(inputs[0], node.attributes["function"]))
        if node.kind == "add":
            return inputs[0] + inputs[-1]  # x + x has one input
        if node.kind == "avg_pool":
            settings = node.attributes
            odd = settings["ceil_mode"] or settings["divisor_override"] is not None
            return _unless_zero(inputs[0]) if odd or any(settings["padding"]) else inputs[0]
        if node.kind == "flatten":
            return inputs[0].repeat_interleave(_width(node) // len(inputs[0]))
        if node.kind in _UNCHANGED:
            return inputs[0]
        return torch.full((_width(node),), torch.nan, dtype=torch.float64)

    def kernels(self, node: TracedNode, given: Tensor, needed: Tensor) -> Tensor:
        """[O, C] bool: the kernels that are alive."""
        return self._used(node) & (given != 0) & needed[:, None]

    def read(self, node: TracedNode, needed: Tensor, given: Tensor, kernels: Tensor | None) -> Tensor:
        """[channels of one input] bool: what ``node`` reads of it; ``given`` has that input's width."""
        if kernels is not None:
            return kernels.any(0)
        if node.kind == "batch_norm":
            weight = _module(node, nn.BatchNorm2d).weight
            return needed & (weight.detach().cpu() != 0) if self.values and weight is not None else needed
        if node.kind == "flatten":
            return needed.view(len(given), -1).any(1)
        if node.kind in _CHANNEL_BY_CHANNEL:
            return needed
        return torch.ones_like(given)

    def _convolved(self, node: TracedNode, given: Tensor) -> Tensor:
        """The constants that a conv or linear layer makes with the values it holds."""
        reading = self._used(node) & (given != 0)
        uniform = given if _keeps_constants(node) else _unless_zero(given)
        sums = _dense_weight(node).double().sum(2)
        constant = torch.where(reading, sums * uniform, 0.0).sum(1)
        bias = getattr(node.module, "bias", None)
        if bias is not None:
            constant += bias.detach().cpu()
        if node.kind == "packed_conv":  # an absent channel holds 0, whatever the bias says
            constant[list(_module(node, PackedConv2d).structure.absent)] = 0
        return constant

    def _trained(self, node: TracedNode, given: Tensor) -> Tensor:
        """The channels of a conv or linear layer that stay zero while it is trained."""
        used = self._used(node)
        fed = (used & (given != 0)).any(1)
        if getattr(node.module, "bias", None) is not None:
            if node.path not in self.masks:
                fed = torch.ones_like(fed)
            elif self._runs_often(node):  # its bias is cleared only where no run reads anything
                fed = used.any(1)
        return torch.zeros(len(fed), dtype=torch.float64).masked_fill(fed, torch.nan)

    def _normalised(self, node: TracedNode, given: Tensor) -> Tensor:
        norm = _module(node, nn.BatchNorm2d)
        if not self.values:
            clearable = norm.weight is not None and not self._runs_often(node)
            return _unless_zero(given) if clearable else torch.full_like(given, torch.nan)
        assert norm.running_mean is not None  # trace calls any other BN opaque
        assert norm.running_var is not None
        mean, variance = norm.running_mean.detach().cpu().double(), norm.running_var.detach().cpu().double()
        normal = (given - mean) * (variance + norm.eps).rsqrt()
        if norm.weight is None:
            return normal
        gamma, beta = norm.weight.detach().cpu().double(), norm.bias.detach().cpu().double()
        return torch.where(gamma == 0, beta, beta + normal * gamma)

    def _runs_often(self, node: TracedNode) -> bool:
        return len(self.network.calls(node.path)) > 1

    def _used(self, node: TracedNode) -> Tensor:
        """[O, C] bool: the kernels that may carry anything, whatever they read and whoever reads them."""
        if node.name not in self._in_use:
            self._in_use[node.name] = self._find_used(node)
        return self._in_use[node.name]

    def _find_used(self, node: TracedNode) -> Tensor:
        shape = _matrix_shape(node)
        used = (_dense_weight(node) != 0).any(2) if self.values else _connections(node, shape)
        mask = self.masks.get(node.path)
        if mask is None:
            return used
        if mask.shape[:2] != shape or mask.numel() != shape.numel():
            raise DSPShapeError(
                f"the mask of layer {node.path!r} has shape {tuple(mask.shape)}; "
                f"expected {tuple(shape)} or {(*shape, 1, 1)}"
            )
        return used & (mask.detach().cpu().reshape(shape) != 0)


_Module = TypeVar("_Module", bound=nn.Module)


def _module(node: TracedNode, kind: type[_Module]) -> _Module:
    assert isinstance(node.module, kind)  # trace classified it so
    return node.module


def _width(node: TracedNode) -> int:
    """Channels of a value; 0 for what only opaque nodes make, something without channels."""
    return node.shape[1] if node.shape is not None and len(node.shape) > 1 else 0


def _unless_zero(constant: Tensor) -> Tensor:
    """The constants that are zero; every other channel varies."""
    return torch.where(constant == 0, constant, torch.nan)


def _matrix_shape(node: TracedNode) -> torch.Size:
    if node.kind == "linear":
        return _module(node, nn.Linear).weight.shape
    layer = node.module
    assert isinstance(layer, nn.Conv2d | PackedConv2d)
    return torch.Size((layer.out_channels, layer.in_channels))


def _dense_weight(node: TracedNode) -> Tensor:
    """[O, C, kh * kw] of a conv, packed conv or linear layer; zeros where it has no weight."""
    if node.kind == "linear":
        return _module(node, nn.Linear).weight.detach().cpu()[:, :, None]
    if node.kind == "packed_conv":
        packed = _module(node, PackedConv2d)
        area = packed.kernel_size[0] * packed.kernel_size[1]
        dense = torch.zeros(packed.out_channels, packed.in_channels, area, dtype=torch.float64)
        for group, branch in zip(packed.structure.groups, packed.weights, strict=True):
            rows, columns = torch.tensor(group.out_index), torch.tensor(group.in_index, dtype=torch.long)
            dense[rows[:, None], columns] = branch.detach().cpu().double().flatten(2)
        return dense
    conv = _module(node, nn.Conv2d)
    weight = conv.weight.detach().cpu().flatten(2)
    if conv.groups == 1:
        return weight
    blocks = weight.view(conv.groups, -1, *weight.shape[1:])
    dense = weight.new_zeros(conv.groups, blocks.shape[1], conv.groups, *weight.shape[1:])
    every = torch.arange(conv.groups)
    dense[every, :, every] = blocks
    return dense.view(conv.out_channels, conv.in_channels, -1)


def _connections(node: TracedNode, shape: torch.Size) -> Tensor:
    """[O, C] bool: where a conv, packed conv or linear layer has a weight, whatever its value."""
    if node.kind == "packed_conv":
        connected = torch.zeros(shape, dtype=torch.bool)
        for group in _module(node, PackedConv2d).structure.groups:
            rows, columns = torch.tensor(group.out_index), torch.tensor(group.in_index, dtype=torch.long)
            connected[rows[:, None], columns] = True
        return connected
    groups = node.module.groups if isinstance(node.module, nn.Conv2d) else 1
    block = torch.ones(shape[0] // groups, shape[1] // groups, dtype=torch.bool)
    return torch.block_diag(*[block] * groups)


def _keeps_constants(node: TracedNode) -> bool:
    """Whether a constant map stays constant: not where zeros are padded around it."""
    layer = node.module
    if not isinstance(layer, nn.Conv2d | PackedConv2d) or layer.padding == "valid":
        return True
    return getattr(layer, "padding_mode", "zeros") != "zeros" or layer.padding == (0, 0)
