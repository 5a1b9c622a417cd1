"""What each kind of operation does to a channel that holds one number for every input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPShapeError
from dsp_kernels.graph.network import TracedNode
from dsp_kernels.op.activations import activate
from dsp_kernels.op.packed import PackedConv2d
from dsp_pruning.flow.kernels import connections, groups_of, kernel_sums, matrix_shape, nonzero_kernels
from dsp_pruning.flow.map import ChannelMap, norm_of

__all__ = ["Rules", "Semantics", "keeps_constants"]

Semantics = Literal["eval", "pruning"]


class Rules:
    """Constants after every kind of node, and which of its input channels it reads.

    Constants are [channels] float64 vectors, NaN where a channel varies.
    """

    def __init__(self, paths: ChannelMap, masks: Mapping[str, Tensor], semantics: Semantics) -> None:
        self.paths = paths
        self.masks = masks
        self.values = semantics == "eval"  # whether the values of parameters count
        self._in_use: dict[str, Tensor] = {}

    def constant(self, node: TracedNode, constants: Mapping[str, Tensor]) -> Tensor:
        """[channels] of the value that ``node`` makes, given those of the values before it."""
        if node.name in self.paths.readers:
            given = constants[node.inputs[0]]
            return self._convolved(node, given) if self.values else self._trained(node, given)
        made = torch.full((self.paths.width[node.name],), torch.nan, dtype=torch.float64)
        wires = self.paths.wires[node.name]
        if not wires:
            return made
        values = [constants[wire.source][wire.source_index] for wire in wires]
        if node.kind in ("add", "combine"):
            return _combined(node.attributes.get("operation", "add"), *values)
        for wire, value in zip(wires, values, strict=True):
            made[wire.index] = value
        if node.kind in ("batch_norm", "functional_norm", "instance_norm"):
            return self._normalised(node, made)
        return _straight(node, made)

    def kernels(self, node: TracedNode, given: Tensor, needed: Tensor) -> Tensor:
        """[O, C / groups] bool: the kernels that are alive."""
        return self._used(node) & _per_filter(node, given != 0) & needed[:, None]

    def read(self, node: TracedNode, needed: Tensor, kernels: Tensor | None) -> dict[str, Tensor]:
        """Input name -> [channels] bool: what ``node`` reads of it, if ``needed`` of its output is needed."""
        width = self.paths.width
        if kernels is not None:
            groups = groups_of(node.module)
            return {node.inputs[0]: kernels.view(groups, -1, kernels.shape[1]).any(1).flatten()}
        wires = self.paths.wires[node.name]
        if not wires:
            return {name: torch.ones(width[name], dtype=torch.bool) for name in node.inputs if name in width}
        if node.kind in ("batch_norm", "functional_norm") and self.values:
            weight = norm_of(node).weight
            if isinstance(weight, Tensor):
                needed = needed & (weight.detach().cpu() != 0)
        found: dict[str, Tensor] = {}
        for wire in wires:
            read = found.setdefault(wire.source, torch.zeros(width[wire.source], dtype=torch.bool))
            read[wire.source_index[needed[wire.index]]] = True
        return found

    def runs_often(self, node: TracedNode) -> bool:
        """Whether the module of a node runs more than once."""
        return node.path != "" and len(self.paths.network.calls(node.path)) > 1

    def _convolved(self, node: TracedNode, given: Tensor) -> Tensor:
        """The constants that a conv or linear layer makes with the values it holds."""
        uniform = given if keeps_constants(node) else torch.where(given == 0, given, torch.nan)
        used = self._used(node)
        constant = torch.zeros(len(used), dtype=torch.float64)
        if groups_of(node.module) == 1:
            columns = (~uniform.isnan() & (uniform != 0)).nonzero().flatten()
            if len(columns):
                constant += (kernel_sums(node, columns) * used[:, columns]) @ uniform[columns]
        else:
            folded = _per_filter(node, torch.where(uniform.isnan(), 0.0, uniform))
            if folded.any():
                every = torch.arange(used.shape[1])
                constant += (kernel_sums(node, every) * used * folded).sum(1)
        bias = getattr(node.module, "bias", None)
        if bias is not None:
            constant += bias.detach().cpu()
        if isinstance(node.module, PackedConv2d):  # an absent channel holds 0, whatever the bias says
            constant[list(node.module.structure.absent)] = 0
        return constant.masked_fill((used & _per_filter(node, uniform.isnan())).any(1), torch.nan)

    def _trained(self, node: TracedNode, given: Tensor) -> Tensor:
        """The channels of a conv or linear layer that stay zero while it is trained."""
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
        if not self.values:
            clearable = norm.weight is not None and not self.runs_often(node) and node.kind == "batch_norm"
            return _unless_zero(given) if clearable else torch.full_like(given, torch.nan)
        statistics = [getattr(norm, name, None) for name in ("running_mean", "running_var")]
        if any(value is None for value in statistics):  # an instance norm: 0 has mean and variance 0
            normal = _unless_zero(given)
        else:
            mean, variance = (t.detach().cpu().double() for t in statistics if t is not None)
            normal = (given - mean) * (variance + norm.eps).rsqrt()
        if norm.weight is None:
            return normal
        gamma, beta = norm.weight.detach().cpu().double(), norm.bias.detach().cpu().double()
        return torch.where(gamma == 0, beta, beta + normal * gamma)

    def _used(self, node: TracedNode) -> Tensor:
        """[O, C / groups] bool: kernels that may carry anything, whoever feeds and reads them."""
        if node.name not in self._in_use:
            self._in_use[node.name] = self._find_used(node)
        return self._in_use[node.name]

    def _find_used(self, node: TracedNode) -> Tensor:
        shape = torch.Size(matrix_shape(node))
        used = nonzero_kernels(node) if self.values else connections(node)
        mask = self.masks.get(node.path)
        if mask is None:
            return used
        if mask.shape[:2] != shape or mask.numel() != shape.numel():
            raise DSPShapeError(
                f"the mask of layer {node.path!r} has shape {tuple(mask.shape)}; "
                f"expected {tuple(shape)} or {(*shape, 1, 1)}"
            )
        return used & (mask.detach().cpu().reshape(shape) != 0)


def keeps_constants(node: TracedNode) -> bool:
    """Whether a layer turns constant maps into constant maps: not where zeros are padded around them."""
    layer = node.module
    if isinstance(layer, nn.ConvTranspose2d):
        return False
    if not isinstance(layer, nn.Conv2d | PackedConv2d) or layer.padding == "valid":
        return True
    return getattr(layer, "padding_mode", "zeros") != "zeros" or layer.padding == (0, 0)


def _straight(node: TracedNode, given: Tensor) -> Tensor:
    """Constants after an operation that works channel by channel, or only moves channels."""
    if node.kind == "activation":
        return torch.where(given.isnan(), given, activate(given, node.attributes["function"]))
    if node.kind == "elementwise":
        made = node.attributes["apply"](given).to(given)
        return torch.where(given.isnan() | ~made.isfinite(), torch.nan, made)
    if node.kind == "avg_pool":
        settings = node.attributes
        counts_zeros = any(settings["padding"]) and settings["count_include_pad"]
        return _unless_zero(given) if counts_zeros or settings["divisor_override"] is not None else given
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
    filters = matrix_shape(node)[0] // groups
    return channels.view(groups, 1, -1).expand(-1, filters, -1).reshape(groups * filters, -1)


def _unless_zero(constant: Tensor) -> Tensor:
    """The constants that are zero; every other channel varies."""
    return torch.where(constant == 0, constant, torch.nan)
