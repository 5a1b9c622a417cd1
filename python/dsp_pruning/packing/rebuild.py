"""Modules after packing, made from the original ones and their plan."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsp_kernels import PackedConv2d
from dsp_kernels.graph.size_check import FixedSizeConv2d, fixed_size
from dsp_kernels.program.planner import zero_padding
from dsp_pruning.flow.kernels import dense_weight
from dsp_pruning.packing.plan import LayerPlan

__all__ = ["rebuild", "replace_module", "set_width"]


def rebuild(module: nn.Module, plan: LayerPlan) -> nn.Module:
    """The module that does the rest of its work; ``module`` itself, changed, where it can."""
    for name in ("group", "mask"):
        if isinstance(module, nn.Conv2d) and hasattr(module, name):
            delattr(module, name)
    if isinstance(module, nn.Linear):
        return _linear(module, plan)
    if isinstance(module, nn.Conv2d | PackedConv2d):
        made = _convolution(module, plan)
        return made if plan.position_bias is None else _with_places(made, plan)
    rows = list(plan.out_keep)
    if isinstance(module, nn.ConvTranspose2d):
        _narrow(module, "weight", (list(plan.in_keep), rows))
        _narrow(module, "bias", (rows,))
        module.in_channels, module.out_channels = len(plan.in_keep), len(rows)
        return module
    if len(rows) != plan.out_channels:
        for name in ("weight", "bias", "running_mean", "running_var"):
            _narrow(module, name, (rows,))
        set_width(module, len(rows))
    return module


def set_width(norm: nn.Module, width: int) -> None:
    """Tell a norm how many channels it has now."""
    if isinstance(norm, nn.GroupNorm):  # of one channel per group
        norm.num_groups = norm.num_channels = width
    else:
        norm.num_features = width  # type: ignore[assignment]


def _with_places(conv: nn.Module, plan: LayerPlan) -> FixedSizeConv2d:
    assert isinstance(conv, nn.Conv2d | PackedConv2d)
    assert plan.position_bias is not None
    assert plan.in_size is not None
    like = next((p for p in conv.parameters()), plan.position_bias)
    return FixedSizeConv2d(conv, fixed_size(*plan.in_size), plan.position_bias.to(like)).train(conv.training)


def replace_module(root: nn.Module, path: str, made: nn.Module) -> None:
    """Put a module in the place of the one at ``path``, and in every other place where that one is held."""
    old = root.get_submodule(path)
    places = [place for place, module in root.named_modules(remove_duplicate=False) if module is old]
    for place in places if made is not old else ():
        parent, _, name = place.rpartition(".")
        setattr(root.get_submodule(parent), name, made)


def _linear(linear: nn.Linear, plan: LayerPlan) -> nn.Linear:
    if len(plan.in_keep) != linear.in_features:
        linear.in_features = len(plan.in_keep)
        _narrow(linear, "weight", (slice(None), list(plan.in_keep)))
    if len(plan.out_keep) != linear.out_features:
        linear.out_features = len(plan.out_keep)
        _narrow(linear, "weight", (list(plan.out_keep),))
        _narrow(linear, "bias", (list(plan.out_keep),))
    if plan.bias is not None:
        linear.bias = nn.Parameter(
            torch.tensor(plan.bias, dtype=torch.float64).to(linear.weight), linear.weight.requires_grad
        )
    return linear


def _convolution(conv: nn.Conv2d | PackedConv2d, plan: LayerPlan) -> nn.Module:
    structure, rows = plan.structure, list(plan.out_keep)
    whole = len(plan.in_keep) == plan.in_channels and len(rows) == plan.out_channels
    if whole and plan.bias is None and (structure is None or structure.is_dense):
        return conv
    if structure is None:  # groups are whole groups: the first channels of a row say which
        assert isinstance(conv, nn.Conv2d)
        _narrow(conv, "weight", (rows,))
        _narrow(conv, "bias", (rows,))
        conv.groups = conv.groups * len(rows) // plan.out_channels
        conv.in_channels, conv.out_channels = len(plan.in_keep), len(rows)
        return conv
    weight = dense_weight(conv)
    bias = torch.tensor(plan.bias, dtype=torch.float64).to(weight) if plan.bias is not None else None
    if bias is None and conv.bias is not None:
        bias = conv.bias.detach()[rows]
    padding = zero_padding(conv) if isinstance(conv, nn.Conv2d) else conv.padding
    into = torch.tensor(plan.in_keep, device=weight.device)
    out = torch.tensor(plan.out_keep, device=weight.device)
    if isinstance(padding, str):  # no packed convolution pads so: a narrower one with zeros in place
        assert isinstance(conv, nn.Conv2d)
        kept = weight.new_zeros(len(rows), len(plan.in_keep), *conv.kernel_size)
        for group in structure.groups:
            at = torch.tensor(group.out_index)[:, None], torch.tensor(group.in_index, dtype=torch.long)
            kept[at] = weight[out[at[0]], into[at[1]]]
        conv.weight = nn.Parameter(kept, conv.weight.requires_grad)
        conv.bias = None if bias is None else nn.Parameter(bias, conv.weight.requires_grad)
        conv.in_channels, conv.out_channels = len(plan.in_keep), len(rows)
        return conv
    made = PackedConv2d(
        structure,
        conv.kernel_size,
        conv.stride,
        padding,
        conv.dilation,
        bias=bias is not None,
        device="meta",  # no time for numbers that are overwritten
        dtype=weight.dtype,
    ).to_empty(device=weight.device)
    made.reset_index(weight.device)
    with torch.no_grad():
        for group, branch in zip(structure.groups, made.weights, strict=True):
            columns = into[torch.tensor(group.in_index, dtype=torch.long)]
            branch.copy_(weight[out[list(group.out_index)][:, None], columns])
        if made.bias is not None and bias is not None:
            made.bias.copy_(bias)
    trained = next(conv.parameters()).requires_grad if list(conv.parameters()) else True
    return made.requires_grad_(trained).train(conv.training)


def _narrow(module: nn.Module, name: str, index: tuple[slice | list[int], ...]) -> None:
    """Keep these entries of a parameter or buffer along its first dimensions."""
    value = getattr(module, name, None)
    if not isinstance(value, Tensor):
        return
    kept = value.detach()
    for dim, part in enumerate(index):
        if isinstance(part, list):
            kept = kept.index_select(dim, torch.tensor(part, dtype=torch.long, device=kept.device))
    if isinstance(value, nn.Parameter):
        setattr(module, name, nn.Parameter(kept.clone(), value.requires_grad))
    else:
        setattr(module, name, kept.clone())
