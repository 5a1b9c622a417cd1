"""Where a pruned network has to stay zero, and restoring these zeros after a training step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsp_kernels.graph.network import TracedNetwork
from dsp_pruning.flow.channels import channel_flow
from dsp_pruning.layers import LayerInfo


@dataclass(frozen=True)
class Zeros:
    """The zeros that the layers' masks imply.

    masks: [O, C, 1, 1] of every layer, and the version of the tensor. places: module, parameter name and a
    bool tensor that broadcasts over the parameter, True where it is zero.
    """

    masks: list[tuple[Tensor, int]]
    places: list[tuple[nn.Module, str, Tensor]]

    def valid_for(self, masks: list[Tensor]) -> bool:
        """Are these the same, unmodified masks? Compares no values, so that no step waits for the device."""
        return all(
            mask is known and mask._version == version
            for mask, (known, version) in zip(masks, self.masks, strict=True)
        )

    @torch.no_grad()
    def restore(self) -> None:
        for module, name, gone in self.places:
            module.get_parameter(name).masked_fill_(gone, 0)


def zeros_of(model: nn.Module, layers: Sequence[LayerInfo], network: TracedNetwork | None) -> Zeros:
    """The masked kernels and, for a pruned filter, the conv's bias and the weight and bias of its batch norm.

    A constant left there would be an input of the next layer. Without a traced network no batch norm is
    cleared.
    """
    matrices = {layer.name: mask_matrix(layer) for layer in layers}
    places: list[tuple[nn.Module, str, Tensor]] = []
    for layer in layers:
        kept = matrices[layer.name].to(layer.conv.weight.device)
        places.append((layer.conv, "weight", ~kept[:, :, None, None]))
        if layer.conv.bias is not None:
            places.append((layer.conv, "bias", ~kept.any(1)))
    if network is not None:
        flow = channel_flow(network, matrices, "pruning")
        for path in clearable(network):
            norm = model.get_submodule(path)
            zero = flow[network.calls(path)[0].inputs[0]].zero.to(norm.get_parameter("weight").device)
            places += [(norm, "weight", zero), (norm, "bias", zero)]
    masks = [layer.conv.get_buffer("mask") for layer in layers]
    return Zeros([(mask, mask._version) for mask in masks], places)


def clearable(network: TracedNetwork | None) -> list[str]:
    """Paths of the batch norms whose weight and bias may be cleared: affine, not frozen, and called once."""
    if network is None:
        return []
    return [
        node.path
        for node in network.of_kind("batch_norm")
        if len(network.calls(node.path)) == 1 and node.attributes["clearable"]
    ]


def mask_matrix(layer: LayerInfo) -> Tensor:
    """[O, C] bool on the CPU: the conv's mask."""
    return layer.conv.get_buffer("mask")[:, :, 0, 0].cpu() != 0
