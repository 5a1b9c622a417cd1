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
from dsp_kernels.graph.network import TracedNetwork, TracedNode
from dsp_kernels.op.activations import activate
from dsp_kernels.op.packed import PackedConv2d
from dsp_pruning.flow.kernels import connections, dense_weight, groups_of, kernel_sums, own_bias
from dsp_pruning.flow.map import ChannelMap, norm_of

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
        for name, read in rules.read(node, needed, kernels.get(node.name)).items():
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
        made = torch.full((self.map.width[node.name],), torch.nan, dtype=torch.float64)
        links = self.map.links[node.name]
        if not links:
            return made
        values = [constants[link.source][link.source_index] for link in links]
        if node.kind in ("add", "combine"):
            return _combined(node.attributes.get("operation", "add"), *values)
        for link, value in zip(links, values, strict=True):
            made[link.index] = value
        if node.kind in ("batch_norm", "functional_norm", "instance_norm"):
            return self._normalised(node, made)
        return _channelwise(node, made)

    def kernels(self, node: TracedNode, given: Tensor, needed: Tensor) -> Tensor:
        """[O, C / groups] bool: the kernels that are alive."""
        return self._used(node) & _per_filter(node, given != 0) & needed[:, None]

    def read(self, node: TracedNode, needed: Tensor, kernels: Tensor | None) -> dict[str, Tensor]:
        """Input name -> [channels] bool: what the node reads of it to compute the ``needed`` channels."""
        width = self.map.width
        if kernels is not None:
            groups = groups_of(node.module)
            return {node.inputs[0]: kernels.view(groups, -1, kernels.shape[1]).any(1).flatten()}
        links = self.map.links[node.name]
        if not links:
            return {name: torch.ones(width[name], dtype=torch.bool) for name in node.inputs if name in width}
        if node.kind in ("batch_norm", "functional_norm") and self.frozen:
            weight = norm_of(node).weight
            if isinstance(weight, Tensor):
                needed = needed & (weight.detach().cpu() != 0)
        found: dict[str, Tensor] = {}
        for link in links:
            read = found.setdefault(link.source, torch.zeros(width[link.source], dtype=torch.bool))
            read[link.source_index[needed[link.index]]] = True
        return found

    def runs_often(self, node: TracedNode) -> bool:
        """Whether the node's module runs more than once."""
        return node.path != "" and len(self.map.network.calls(node.path)) > 1

    def _layer_in_eval(self, node: TracedNode, given: Tensor) -> Tensor:
        uniform = given if keeps_constants(node) else torch.where(given == 0, given, torch.nan)
        used = self._used(node)
        constant = own_bias(node.module)
        if groups_of(node.module) == 1:
            columns = (~uniform.isnan() & (uniform != 0)).nonzero().flatten()
            if len(columns):
                constant += (kernel_sums(node.module, columns) * used[:, columns]) @ uniform[columns]
        else:
            folded = _per_filter(node, torch.where(uniform.isnan(), 0.0, uniform))
            if folded.any():
                constant += (kernel_sums(node.module, torch.arange(used.shape[1])) * used * folded).sum(1)
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

    def _normalised(self, node: TracedNode, given: Tensor) -> Tensor:
        norm = norm_of(node)
        assert isinstance(norm, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm)
        if not self.frozen:
            clearable = learns(norm) and not self.runs_often(node) and node.kind == "batch_norm"
            return _zeros_of(given) if clearable else torch.full_like(given, torch.nan)
        mean, variance = (getattr(norm, name, None) for name in ("running_mean", "running_var"))
        if mean is None or variance is None:  # instance norm: zeros have mean and variance 0
            normal = _zeros_of(given)
        else:
            normal = (given - mean.cpu().double()) * (variance.cpu().double() + norm.eps).rsqrt()
        if norm.weight is None:
            return normal
        gamma, beta = norm.weight.detach().cpu().double(), norm.bias.detach().cpu().double()
        return torch.where(gamma == 0, beta, beta + normal * gamma)

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


def learns(norm: nn.Module | None) -> bool:
    """Whether a norm has a weight and a bias that training changes."""
    pair = [getattr(norm, name, None) for name in ("weight", "bias")]
    return all(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in pair)


def keeps_constants(node: TracedNode) -> bool:
    """Whether a layer maps constant channels to constant channels: not where it pads them with zeros."""
    layer = node.module
    if isinstance(layer, nn.ConvTranspose2d):
        return False
    if not isinstance(layer, nn.Conv2d | PackedConv2d) or layer.padding == "valid":
        return True
    return getattr(layer, "padding_mode", "zeros") != "zeros" or layer.padding == (0, 0)


def _channelwise(node: TracedNode, given: Tensor) -> Tensor:
    if node.kind == "activation":
        return torch.where(given.isnan(), given, activate(given, node.attributes["function"]))
    if node.kind == "elementwise":
        made = node.attributes["apply"](given).to(given)
        return torch.where(given.isnan() | ~made.isfinite(), torch.nan, made)
    if node.kind == "avg_pool":
        settings = node.attributes
        counts_zeros = any(settings["padding"]) and settings["count_include_pad"]
        return _zeros_of(given) if counts_zeros or settings["divisor_override"] is not None else given
    if node.kind == "pad" and node.attributes["mode"] == "constant":
        return torch.where(given == node.attributes["value"], given, torch.nan)
    return given


def _combined(operation: str, left: Tensor, right: Tensor) -> Tensor:
    if operation == "multiply":
        return torch.where((left == 0) | (right == 0), 0.0, left * right)
    return left - right if operation == "subtract" else left + right


def _per_filter(node: TracedNode, channels: Tensor) -> Tensor:
    """[channels] -> [1 or O, C / groups]: the entries of the channels that each filter has columns for."""
    groups = groups_of(node.module)
    if groups == 1:
        return channels[None]
    assert isinstance(node.module, nn.Conv2d)
    return channels.view(groups, -1).repeat_interleave(node.module.out_channels // groups, 0)


def _zeros_of(constant: Tensor) -> Tensor:
    """The constants that are zero; every other channel varies."""
    return torch.where(constant == 0, constant, torch.nan)
