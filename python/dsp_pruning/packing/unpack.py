"""unpack(packed): from packed layers back to a dense network with masks and the same outputs."""

import copy
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPPruningError
from dsp_kernels.graph.size_check import FixedSizeConv2d
from dsp_pruning.flow.kernels import connections, dense_weight, own_bias
from dsp_pruning.packing.rebuild import change_channels, change_tensor, replace_module, set_widths
from dsp_pruning.packing.report import LayerPlan, PackingReport


def unpack(packed: nn.Module) -> nn.Module:
    """A dense copy of a packed network, with its original widths and the same outputs in eval mode.

    Every PackedConv2d becomes an ``nn.Conv2d`` with a buffer ``mask`` [O, C, 1, 1] of 0 and 1. Removed
    channels are back with weight, bias and shift 0 and variance 1, and nothing reads them. A constant that
    was folded into a bias stays there.

    Raises DSPPruningError if the network has no PackingReport, for example because it was built by hand.

    >>> from dsp_pruning import pack
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    >>> _ = model[0].weight.data[:3].zero_(), model[0].bias.data[:3].zero_()
    >>> packed = pack(model, torch.zeros(1, 3, 8, 8))
    >>> packed[0].out_channels, unpack(packed)[0].out_channels
    (5, 8)
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
        # For layers without any weights left, which have no dtype of their own.
        dtype = next((t.dtype for t in state if t.is_floating_point()), torch.get_default_dtype())
        for path, plan in report.layers.items():
            if plan.axis is None:
                replace_module(dense, path, _dense(dense.get_submodule(path), plan, dtype))
            else:
                change_tensor(dense, path, partial(_dense_tensor, plan, plan.axis))
    return dense


def _dense(module: nn.Module, plan: LayerPlan, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, FixedSizeConv2d):
        widen = partial(_widen, "position_bias", 0, plan.out_keep, plan.out_channels)
        change_tensor(module, "position_bias", widen)
        module.conv = _dense(module.conv, plan, dtype)  # type: ignore[assignment]
    elif isinstance(module, PackedConv2d):
        return _dense_conv(module, plan, dtype)
    else:
        change_channels(module, plan, _widen)
        set_widths(module, plan.in_channels, plan.out_channels)
    return module


def _dense_tensor(plan: LayerPlan, axis: int, tensor: Tensor) -> Tensor:
    if plan.in_channels:
        tensor = torch.tensor(plan.in_keep, device=tensor.device)[tensor]
    return _widen(plan.path.rpartition(".")[2], axis, plan.out_keep, plan.out_channels, tensor)


def _dense_conv(packed: PackedConv2d, plan: LayerPlan, dtype: torch.dtype) -> nn.Conv2d:
    own = next((parameter.dtype for parameter in packed.parameters()), dtype)
    device = packed.get_buffer("output_place").device
    sizes = plan.in_channels, plan.out_channels, packed.kernel_size, packed.stride, packed.padding
    conv = nn.Conv2d(*sizes, packed.dilation, bias=packed.bias is not None, device=device, dtype=own)
    rows, columns = torch.tensor(plan.out_keep), torch.tensor(plan.in_keep)
    mask = torch.zeros(plan.out_channels, plan.in_channels, 1, 1, dtype=own)
    mask[rows[:, None], columns, 0, 0] = connections(packed).to(own)
    conv.register_buffer("mask", mask.to(device))
    with torch.no_grad():
        conv.weight.zero_()
        conv.weight[rows[:, None], columns] = dense_weight(packed).to(conv.weight)
        if conv.bias is not None:
            conv.bias.zero_()
            conv.bias[rows] = own_bias(packed).to(conv.bias)
    return conv.train(packed.training)


def _widen(name: str, dim: int, kept: Sequence[int], width: int, tensor: Tensor) -> Tensor:
    """Put the entries back in their places along one dimension; the others are neutral."""
    shape = (*tensor.shape[:dim], width, *tensor.shape[dim + 1 :])
    wide = tensor.new_full(shape, float(name == "running_var"))
    return wide.index_copy(dim, torch.tensor(kept, device=tensor.device), tensor)
