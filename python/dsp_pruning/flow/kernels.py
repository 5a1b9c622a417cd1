"""The kernels of a layer as a matrix of filters x channels, however the layer stores them.

A matrix is [O, C / groups]: as ``nn.Conv2d`` stores it, every filter has a column per channel that it reads.
Linear layers and packed or transposed convolutions have groups = 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsp_kernels.graph.network import TracedNode
from dsp_kernels.op.packed import PackedConv2d

__all__ = ["connections", "dense_weight", "groups_of", "kernel_sums", "matrix_shape", "nonzero_kernels"]


def groups_of(module: nn.Module | None) -> int:
    """Groups whose filters read only their own channels."""
    return module.groups if isinstance(module, nn.Conv2d) else 1


def matrix_shape(node: TracedNode) -> tuple[int, int]:
    """(O, C / groups)."""
    layer = node.module
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    assert isinstance(layer, nn.Conv2d | PackedConv2d | nn.ConvTranspose2d)
    return layer.out_channels, layer.in_channels // groups_of(layer)


def nonzero_kernels(node: TracedNode) -> Tensor:
    """[O, C / groups] bool: where at least one weight is not zero."""
    return dense_weight(node.module).ne(0).flatten(2).any(2).cpu()


def kernel_sums(node: TracedNode, columns: Tensor) -> Tensor:
    """[O, columns] float64: the sum over every kernel of some columns. columns: [K] numbers."""
    weight = dense_weight(node.module)
    return weight[:, columns.to(weight.device)].double().flatten(2).sum(2).cpu()


def connections(node: TracedNode) -> Tensor:
    """[O, C / groups] bool: where the layer has a weight, whatever its value."""
    shape = matrix_shape(node)
    if not isinstance(node.module, PackedConv2d):
        return torch.ones(shape, dtype=torch.bool)
    connected = torch.zeros(shape, dtype=torch.bool)
    for group in node.module.structure.groups:
        rows, columns = torch.tensor(group.out_index), torch.tensor(group.in_index, dtype=torch.long)
        connected[rows[:, None], columns] = True
    return connected


def dense_weight(module: nn.Module | None) -> Tensor:
    """[O, C / groups, ...] of a conv, packed or transposed conv or linear layer; 0 where it has no weight.

    A linear layer's weight is [O, C, 1]. It shares memory with the layer where that has such a tensor.
    """
    if isinstance(module, nn.Linear):
        return module.weight.detach()[:, :, None]
    if isinstance(module, nn.ConvTranspose2d):
        return module.weight.detach().transpose(0, 1)
    if isinstance(module, nn.Conv2d):
        return module.weight.detach()
    assert isinstance(module, PackedConv2d)
    structure = module.structure
    some = module.weights[0] if len(module.weights) else torch.empty(0)
    dense = some.new_zeros(structure.out_channels, structure.in_channels, *module.kernel_size)
    for group, branch in zip(structure.groups, module.weights, strict=True):
        columns = torch.tensor(group.in_index, dtype=torch.long)
        dense[torch.tensor(group.out_index)[:, None], columns] = branch.detach()
    return dense
