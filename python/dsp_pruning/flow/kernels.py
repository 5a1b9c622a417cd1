"""Weights of a convolution, packed convolution or linear layer as a matrix of filters x channels.

A matrix is [O, C / groups], as ``nn.Conv2d`` stores it: a filter has one column per channel that it reads.
Linear layers and packed convolutions have groups = 1.
"""

import torch
from torch import Tensor, nn

from dsp_kernels.op import dense
from dsp_kernels.op.packed import PackedConv2d


def groups_of(module: nn.Module | None) -> int:
    """Groups of an ``nn.Conv2d`` or ``nn.ConvTranspose2d``; 1 for every other layer."""
    return module.groups if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) else 1


def kernel_sums(module: nn.Module | None, columns: Tensor) -> Tensor:
    """[O, K] float64: the sum over each kernel of K columns. columns: [K] column numbers."""
    weight = dense_weight(module)
    return weight[:, columns.to(weight.device)].double().flatten(2).sum(2).cpu()


def connections(module: nn.Module | None) -> Tensor:
    """[O, C / groups] bool: where the layer has a kernel, whatever its weights."""
    if not isinstance(module, PackedConv2d):
        return torch.ones(dense_weight(module).shape[:2], dtype=torch.bool)
    structure = module.structure
    ones = [torch.ones(len(g.out_index), len(g.in_index), dtype=torch.bool) for g in structure.groups]
    return dense.dense_weight(structure, ones, ()).bool()


def dense_weight(module: nn.Module | None) -> Tensor:
    """[O, C / groups, kh, kw] of a convolution, [O, C, 1] of a linear layer; 0 where it has no kernel.

    A view of the layer's own weight where it has one.
    """
    if isinstance(module, nn.Linear):
        return module.weight.detach()[:, :, None]
    if isinstance(module, nn.ConvTranspose2d):
        rows = module.weight.detach().unflatten(0, (module.groups, -1))  # [groups, C / groups, ...]
        return rows.transpose(1, 2).flatten(0, 1)
    if isinstance(module, nn.Conv2d):
        return module.weight.detach()
    assert isinstance(module, PackedConv2d)
    return dense.dense_weight(module.structure, [w.detach() for w in module.weights], module.kernel_size)


def own_bias(module: nn.Module | None) -> Tensor:
    """[O] float64 on the CPU; 0 for a layer without bias and for absent channels of a packed convolution."""
    bias = getattr(module, "bias", None)
    if isinstance(module, PackedConv2d):
        bias = dense.live_bias(module.structure, module.bias)
    if bias is None:
        return torch.zeros(len(dense_weight(module)), dtype=torch.float64)
    return bias.detach().double().cpu().clone()
