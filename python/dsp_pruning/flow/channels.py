"""Channel flow: which channels of every tensor in a traced network are constant, and which are read.

One pass forwards finds constant channels, one pass backwards finds channels that are read. On a graph
without cycles this is the fixpoint: a kernel is dead because its input is zero or because nothing reads its
output, and each pass carries one of these through the whole network.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPShapeError
from dsp_kernels.graph.network import TracedNetwork
from dsp_kernels.graph.operations.entry import TracedNode
from dsp_kernels.op.packed import PackedConv2d
from dsp_pruning.flow.kernels import connections, dense_weight, groups_of, kernel_sums, own_bias
from dsp_pruning.flow.map import ChannelMap

Semantics = Literal["eval", "pruning"]


@dataclass(frozen=True, eq=False)
class ChannelState:
    """The channels of one tensor; on the CPU.

    constant: [channels] float64, the number that a channel holds at every position for every input; NaN
        where it varies or is not known to be constant.
    read: [channels] bool, whether the output needs it. What only feeds a channel that is zero anyway is not
        needed, for example a negative constant before a ReLU.
    """

    constant: Tensor
    read: Tensor

    @property
    def zero(self) -> Tensor:
        """[channels] bool: zero for every input."""
        return self.constant == 0

    @property
    def live(self) -> Tensor:
        """[channels] bool: read and not zero. The other channels can be removed."""
        return self.read & ~self.zero


@dataclass(frozen=True, eq=False)
class ChannelFlow:
    """The result of ``channel_flow``.

    states: node name -> state of its output, for every node that returns a tensor.
    kernels: node name -> [O, C / groups] bool for convolutions and linear layers: a kernel is alive if it is
        not zero, reads a channel that is not zero and writes a channel that is live.
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
    channel_map: ChannelMap | None = None,
) -> ChannelFlow:
    """Follow every channel of a traced network forwards and backwards.

    masks: path of a convolution -> [O, C] or [O, C, 1, 1], nonzero where a kernel is kept.
    channel_map: that of the network, if it exists already.

    semantics says what the current value of a parameter proves:

    - ``"eval"``: parameters stay as they are, in eval mode. Batch norm of a constant channel c is the
      constant beta + (c - mean) * gamma / sqrt(var + eps), and beta for every input if gamma = 0; a zero
      kernel is dead in every layer. This is what packing may rely on.
    - ``"pruning"``: training continues, so only masked kernels are dead; every other kernel, norm and linear
      weight counts as in use. Norm and convolution bias of a channel without input count as 0, because the
      pruner clears them, except for a frozen norm and for a module that runs more than once: it cannot be
      cleared for one of its runs.

    A kernel that reads a nonzero constant is alive: it contributes to the output, and zero padding makes that
    contribution vary at the border. An operation without a rule reads all channels and returns varying ones.
    Raises DSPShapeError if a mask does not fit its convolution.
    """
    channel_map = ChannelMap(network) if channel_map is None else channel_map
    rules = _Rules(channel_map, masks or {}, semantics)
    tensors = [node for node in network if node.kind != "scalar"]
    constants: dict[str, Tensor] = {}
    for node in tensors:
        constants[node.name] = rules.constant(node, constants)
    reads = {name: torch.zeros_like(constant, dtype=torch.bool) for name, constant in constants.items()}
    kernels: dict[str, Tensor] = {}
    for node in reversed(tensors):
        needed = reads[node.name]
        if not rules.runs_often(node):  # a kernel that adds up to 0 in one run may be what makes it 0
            needed = needed & (constants[node.name] != 0)
        if node.name in channel_map.layers:
            kernels[node.name] = rules.kernels(node, constants[node.inputs[0]], needed)
        for name, read in rules.read(node, needed, kernels.get(node.name), constants).items():
            reads[name] |= read
    states = {
        node.name: ChannelState(constants[node.name], reads[node.name])
        for node in tensors
        if node.fx_node.op != "output"
    }
    connected = any(bool(reads[node.name].any()) for node in network.of_kind("input"))
    return ChannelFlow(states, kernels, connected)


class _Rules:
    """What every kind of node does to constants, and which of its input channels it reads.

    Constants are [channels] float64, NaN where a channel varies.
    """

    def __init__(self, channel_map: ChannelMap, masks: Mapping[str, Tensor], semantics: Semantics) -> None:
        self.map = channel_map
        self.masks = masks
        self.frozen = semantics == "eval"
        self._in_use: dict[str, Tensor] = {}

    def constant(self, node: TracedNode, constants: Mapping[str, Tensor]) -> Tensor:
        """Constants of the node's output, from those of the tensors before it."""
        if node.name in self.map.layers:
            given = constants[node.inputs[0]]
            return self._layer_in_eval(node, given) if self.frozen else self._layer_in_training(node, given)
        return self._passed(node, constants)

    def _passed(self, node: TracedNode, constants: Mapping[str, Tensor]) -> Tensor:
        """Constants of an operation that is no layer, as its entry in the table says."""
        if node.value is not None and self.frozen:
            return _constant_entries(node, node.value)
        links = self.map.links[node.name]
        cleared_in_one_run = not self.frozen and node.attributes.get("clearable") and self.runs_often(node)
        if not links or cleared_in_one_run:
            return torch.full((node.width,), torch.nan, dtype=torch.float64)
        values = [constants[link.source][link.source_index] for link in links]
        return node.operation.constants(node.attributes, values, self.frozen)

    def kernels(self, node: TracedNode, given: Tensor, needed: Tensor) -> Tensor:
        """[O, C / groups] bool: the kernels that are alive."""
        return self._used(node) & _per_filter(node, given != 0) & needed[:, None]

    def read(
        self, node: TracedNode, needed: Tensor, kernels: Tensor | None, constants: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Input name -> [channels] bool: what the node reads of it to compute the ``needed`` channels."""
        if kernels is not None:
            groups = groups_of(node.module)
            return {node.inputs[0]: kernels.view(groups, -1, kernels.shape[1]).any(1).flatten()}
        links = self.map.links[node.name]
        read = {
            name: torch.full_like(constants[name], not links, dtype=torch.bool)
            for name in node.inputs
            if name in constants
        }
        if node.operation.channels == "same" and links:  # what no input changes needs none
            varying = {
                name: torch.full_like(constants[name], torch.nan)
                if self.map.network[name].batched
                else constants[name]
                for name in read
            }
            needed = needed & self._passed(node, varying).isnan()
        for link in links:
            read[link.source][link.source_index[needed[link.index]]] = True
        return read

    def runs_often(self, node: TracedNode) -> bool:
        """Whether the node's module runs more than once."""
        return node.path != "" and len(self.map.network.calls(node.path)) > 1

    def _layer_in_eval(self, node: TracedNode, given: Tensor) -> Tensor:
        uniform = given if keeps_constants(node) else torch.where(given == 0, given, torch.nan)
        used = self._used(node)
        constant = own_bias(node.module)
        folded = _per_filter(node, torch.where(uniform.isnan(), 0.0, uniform))
        columns = folded.any(0).nonzero().flatten()
        if len(columns):
            constant += (kernel_sums(node.module, columns) * used[:, columns] * folded[:, columns]).sum(1)
        return constant.masked_fill((used & _per_filter(node, uniform.isnan())).any(1), torch.nan)

    def _layer_in_training(self, node: TracedNode, given: Tensor) -> Tensor:
        """0 for the filters that stay zero while the layer is trained."""
        used = self._used(node)
        fed = (used & _per_filter(node, given != 0)).any(1)
        if getattr(node.module, "bias", None) is not None:
            if node.path not in self.masks:
                fed = torch.ones_like(fed)
            elif self.runs_often(node):  # its bias is cleared only where no run reads anything
                fed = used.any(1)
        return torch.zeros(len(fed), dtype=torch.float64).masked_fill(fed, torch.nan)

    def _used(self, node: TracedNode) -> Tensor:
        """[O, C / groups] bool: kernels that may be nonzero, whatever feeds and reads them."""
        if node.name not in self._in_use:
            if self.frozen:
                used = dense_weight(node.module).ne(0).flatten(2).any(2).cpu()
            else:
                used = connections(node.module)
            mask = self.masks.get(node.path)
            if mask is not None:
                shape = used.shape
                if mask.shape[:2] != shape or mask.numel() != shape.numel():
                    raise DSPShapeError(
                        f"the mask of layer {node.path!r} has shape {tuple(mask.shape)}; "
                        f"expected {tuple(shape)} or {(*shape, 1, 1)}"
                    )
                used = used & (mask.detach().cpu().reshape(shape) != 0)
            self._in_use[node.name] = used
        return self._in_use[node.name]


def keeps_constants(node: TracedNode) -> bool:
    """Whether a layer maps constant channels to constant channels: not where it pads them with zeros."""
    layer = node.module
    if isinstance(layer, nn.ConvTranspose2d):
        return False
    if not isinstance(layer, nn.Conv2d | PackedConv2d) or layer.padding == "valid":
        return True
    return getattr(layer, "padding_mode", "zeros") != "zeros" or layer.padding == (0, 0)


def _constant_entries(node: TracedNode, value: Tensor) -> Tensor:
    """The number that a parameter holds in all of its entries of a channel."""
    if not node.width or value.is_complex():
        return torch.full((node.width,), torch.nan, dtype=torch.float64)
    low, high = value.detach().double().cpu().movedim(node.axis, 0).reshape(node.width, -1).aminmax(dim=1)
    return torch.where(low == high, low, torch.nan)


def _per_filter(node: TracedNode, channels: Tensor) -> Tensor:
    """[channels] -> [1 or O, C / groups]: the entries of the channels that each filter has columns for."""
    groups = groups_of(node.module)
    if groups == 1:
        return channels[None]
    assert isinstance(node.module, nn.Conv2d | nn.ConvTranspose2d)
    return channels.view(groups, -1).repeat_interleave(node.module.out_channels // groups, 0)
