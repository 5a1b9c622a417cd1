"""Where zeros have to stay in a pruned network, and putting them back after a training step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsp_kernels.graph.network import TracedNetwork
from dsp_pruning.flow.channels import channel_flow
from dsp_pruning.layers import LayerInfo
from dsp_pruning.prune.rule import mask_matrix

__all__ = [
    "Undo",
    "Zeros",
    "clearable",
    "read_state",
    "zeros_of",
]


@dataclass(frozen=True)
class Zeros:
    """Places that are zero, as long as these masks hold.

    masks: of every layer, [O, C, 1, 1], and versions: of these tensors. places: module, parameter name, and a
    bool tensor that broadcasts over that parameter, True where it is zero.
    """

    masks: list[Tensor]
    versions: list[int]
    places: list[tuple[nn.Module, str, Tensor]]

    def hold_for(self, masks: list[Tensor]) -> bool:
        """Compares identities and versions, not values: no step waits for the device."""
        return all(
            mask is known and mask._version == version
            for mask, known, version in zip(masks, self.masks, self.versions, strict=True)
        )

    @torch.no_grad()
    def restore(self) -> None:
        """Write the zeros."""
        for module, name, gone in self.places:
            module.get_parameter(name).masked_fill_(gone, 0)


def zeros_of(model: nn.Module, layers: Sequence[LayerInfo], network: TracedNetwork | None) -> Zeros:
    """The zeros that the masks on the layers ask for.

    Besides masked kernels these are, for a filter that is gone, the conv's bias and the weight and bias of
    its BN: a constant left there would be an input of the next layer. Without a traced network no BN is
    cleared.
    """
    matrices = {layer.name: mask_matrix(layer) for layer in layers}
    places: list[tuple[nn.Module, str, Tensor]] = []
    for layer in layers:
        device = layer.conv.weight.device
        kept = matrices[layer.name].to(device)
        places.append((layer.conv, "weight", ~kept[:, :, None, None]))
        if layer.conv.bias is not None:
            places.append((layer.conv, "bias", ~kept.any(1)))
    if network is not None:
        flow = channel_flow(network, matrices, "pruning")
        for path in clearable(network):
            norm = model.get_submodule(path)
            unfed = flow[network.calls(path)[0].inputs[0]].zero.to(norm.get_parameter("weight").device)
            places += [(norm, "weight", unfed), (norm, "bias", unfed)]
    masks = [layer.conv.get_buffer("mask") for layer in layers]
    return Zeros(masks, [mask._version for mask in masks], places)


def clearable(network: TracedNetwork | None) -> list[str]:
    """Paths of the BN layers whose weight and bias may be cleared: affine, and run once."""
    if network is None:
        return []
    return [
        node.path
        for node in network.of_kind("batch_norm")
        if len(network.calls(node.path)) == 1 and getattr(node.module, "weight", None) is not None
    ]


@dataclass(frozen=True, eq=False)
class Undo:
    """Parameters and buffers, by dotted name, before a change and after it."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]

    def possible(self, model: nn.Module) -> bool:
        """Whether the model still holds exactly what the change left."""
        return all(
            now.shape == left.shape and now.device == left.device and torch.equal(now, left)
            for now, left in zip(_tensors(model, self.after), self.after.values(), strict=True)
        )

    @torch.no_grad()
    def undo(self, model: nn.Module) -> None:
        """Put the state from before the change back."""
        for tensor, value in zip(_tensors(model, self.before), self.before.values(), strict=True):
            tensor.copy_(value)


def read_state(model: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """Copies of the parameters and buffers of these dotted names."""
    names = list(names)
    return {name: tensor.clone() for name, tensor in zip(names, _tensors(model, names), strict=True)}


def _tensors(model: nn.Module, names: Iterable[str]) -> list[Tensor]:
    found = []
    for name in names:
        path, _, last = name.rpartition(".")
        found.append(getattr(model.get_submodule(path), last).detach())
    return found
