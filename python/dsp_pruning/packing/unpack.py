"""unpack(packed): from packed layers back to a dense network with masks, which answers the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPPruningError
from dsp_kernels.graph.size_check import FixedSizeConv2d
from dsp_pruning.flow.kernels import dense_weight
from dsp_pruning.packing.plan import LayerPlan
from dsp_pruning.packing.rebuild import replace_module, set_width
from dsp_pruning.packing.report import PackingReport

__all__ = ["unpack"]


def unpack(packed: nn.Module) -> nn.Module:
    """A dense copy of a packed network, of the original widths, with the same outputs in eval mode.

    Every PackedConv2d becomes an ``nn.Conv2d`` with a buffer ``mask`` [O, C, 1, 1] of 0 and 1. Channels that
    packing removed are there again: nothing feeds them (weight, bias and shift 0, variance 1) and nothing
    reads them. A constant that packing folded into a bias stays in that bias.

    Raises DSPPruningError if the network carries no PackingReport, as one that was built by hand.
    """
    report = getattr(packed, "packing", None)
    if not isinstance(report, PackingReport):
        raise DSPPruningError(
            f"{type(packed).__name__} carries no PackingReport under 'packing', so its original channels are "
            "not known; unpack what pack() returned"
        )
    with torch.inference_mode(False):
        dense = copy.deepcopy(packed)
        del dense.packing
        state = (*dense.parameters(), *dense.buffers())
        # A layer of which nothing is left has no number that says what its weights would be.
        dtype = next((t.dtype for t in state if t.is_floating_point()), torch.get_default_dtype())
        for path, plan in report.layers.items():
            replace_module(dense, path, _dense(dense.get_submodule(path), plan, dtype))
    return dense


def _dense(module: nn.Module, plan: LayerPlan, dtype: torch.dtype) -> nn.Module:
    rows, columns = plan.out_keep, plan.in_keep
    if isinstance(module, FixedSizeConv2d):  # a copy already
        _widen(module, "position_bias", 0, rows, plan.out_channels)
        dense = _dense(module.conv, plan, dtype)
        assert isinstance(dense, nn.Conv2d)
        module.conv = dense
        return module
    if isinstance(module, PackedConv2d):
        return _dense_conv(module, plan, dtype)
    if len(rows) == plan.out_channels and len(columns) == plan.in_channels:
        return module
    if isinstance(module, nn.Linear):
        _widen(module, "weight", 1, columns, plan.in_channels)
        _widen(module, "weight", 0, rows, plan.out_channels)
        _widen(module, "bias", 0, rows, plan.out_channels)
        module.in_features, module.out_features = plan.in_channels, plan.out_channels
    elif isinstance(module, nn.ConvTranspose2d):
        _widen(module, "weight", 0, columns, plan.in_channels)
        _widen(module, "weight", 1, rows, plan.out_channels)
        _widen(module, "bias", 0, rows, plan.out_channels)
        module.in_channels, module.out_channels = plan.in_channels, plan.out_channels
    elif isinstance(module, nn.Conv2d):
        if plan.structure is not None:
            _widen(module, "weight", 1, columns, plan.in_channels)
        else:
            module.groups = module.groups * plan.out_channels // len(rows)
        _widen(module, "weight", 0, rows, plan.out_channels)
        _widen(module, "bias", 0, rows, plan.out_channels)
        module.in_channels, module.out_channels = plan.in_channels, plan.out_channels
    else:
        for name, fill in (("weight", 0.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            _widen(module, name, 0, rows, plan.out_channels, fill)
        set_width(module, plan.out_channels)
    return module


def _dense_conv(packed: PackedConv2d, plan: LayerPlan, dtype: torch.dtype) -> nn.Conv2d:
    own = next((parameter.dtype for parameter in packed.parameters()), dtype)
    weight = dense_weight(packed).to(packed.get_buffer("output_place").device, own)
    conv = nn.Conv2d(
        *(plan.in_channels, plan.out_channels, packed.kernel_size, packed.stride, packed.padding),
        dilation=packed.dilation,
        bias=packed.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    rows, columns = torch.tensor(plan.out_keep)[:, None], torch.tensor(plan.in_keep)
    mask = torch.zeros(plan.out_channels, plan.in_channels, dtype=weight.dtype)
    for group in packed.structure.groups:
        into = columns[torch.tensor(group.in_index, dtype=torch.long)]
        mask[rows[list(group.out_index)], into] = 1
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[rows, columns] = weight
        if conv.bias is not None and packed.bias is not None:
            bias = packed.bias.detach().clone()
            bias[list(packed.structure.absent)] = 0
            conv.bias.zero_()
            conv.bias[rows[:, 0]] = bias
    conv.register_buffer("mask", mask[:, :, None, None].to(weight.device))
    return conv.train(packed.training)


def _widen(
    module: nn.Module, name: str, dim: int, kept: Sequence[int], width: int, fill: float = 0.0
) -> None:
    """Put the entries of a parameter or buffer back in their places along one dimension."""
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return
    shape = list(value.shape)
    shape[dim] = width
    index = torch.tensor(kept, dtype=torch.long, device=value.device)
    wide = value.detach().new_full(shape, fill).index_copy(dim, index, value.detach())
    setattr(
        module, name, nn.Parameter(wide, value.requires_grad) if isinstance(value, nn.Parameter) else wide
    )
