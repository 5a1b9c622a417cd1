"""The op in plain PyTorch: runs everywhere, and is the fallback of every other backend.

``form_of`` picks one form per layer:
``constant``: no group reads anything;
``uniform``: an ordinary (grouped) convolution;
``single``: one convolution over all channels, with zeros where no group has weights;
``gathered``: the same over the channels that some group reads, gathered first;
``per_group``: gather, one convolution and scatter per group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_kernels.op.activations import activate_
from dsp_kernels.op.spec import ConvSpec, memory_format_of

__all__ = ["EagerBackend", "bias_of_live", "form_of", "zero_filled"]


class EagerBackend:
    """Plain PyTorch on any device and in any floating dtype."""

    name = "eager"

    def can_run(
        self,
        spec: ConvSpec,
        dtype: torch.dtype,
        device: torch.device,
        layout: torch.memory_format = torch.contiguous_format,
    ) -> tuple[bool, str]:
        """Always, for floating dtypes."""
        return (True, "") if dtype.is_floating_point else (False, f"dtype {dtype} is not a floating dtype")

    def prepare(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        """A function (x, residual) -> y; see ``ConvBackend.prepare``."""
        convolve = _FORMS[form_of(spec)](spec, weights, bias)

        def run(x: Tensor, residual: Tensor | None = None) -> Tensor:
            y = convolve(x)
            if residual is not None:
                y = y.add_(residual)
            return activate_(y, spec.activation)

        return run


def form_of(spec: ConvSpec) -> str:
    """The form with the least estimated time: multiply-adds per output pixel plus moved channels."""
    structure = spec.structure
    if not structure.read:
        return "constant"
    if structure.is_uniform:
        return "uniform"
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    input_pixels = spec.stride[0] * spec.stride[1]
    gathered = sum(len(group.in_index) for group in structure.groups)
    scattered = structure.out_channels - len(structure.absent)
    cost = {
        "single": structure.in_channels * structure.out_channels * taps,
        "gathered": len(structure.read) * (structure.out_channels * taps + _MOVE_COST * input_pixels),
        "per_group": structure.kernels * taps + _MOVE_COST * (gathered * input_pixels + 2 * scattered),
    }
    return min(cost, key=lambda form: cost[form])


# Cost of moving one channel of one pixel, in multiply-adds of an efficient convolution. Measured on every
# conv of ResNet-56 g=4 (batch 1, 32, 128) and ResNet-50 80 % (batch 1, 8), float32, channels_last, 2 Zen 5
# cores, torch 2.15: with 400 the rule costs at most 4 % over the best form of each layer; 200 costs up to
# 22 %, and always one conv per group 4.7x (ResNet-56, batch 128) and 2.9x (ResNet-50, batch 8).
_MOVE_COST = 400


def bias_of_live(spec: ConvSpec, bias: Tensor | None) -> Tensor | None:
    """(out_channels,): the bias with 0 in the absent channels, which have none by definition."""
    if bias is None or not spec.structure.absent:
        return bias
    return bias.index_fill(0, torch.tensor(spec.structure.absent, device=bias.device), 0.0)


def zero_filled(spec: ConvSpec, weights: Sequence[Tensor]) -> Tensor:
    """(out_channels, in_channels, kh, kw), channels_last: the weights of all groups as one dense kernel."""
    structure = spec.structure
    full = weights[0].new_zeros(structure.out_channels, structure.in_channels, *spec.kernel_size)
    for group, weight in zip(structure.groups, weights, strict=True):
        rows = torch.tensor(group.out_index, device=full.device)
        columns = torch.tensor(group.in_index, dtype=torch.long, device=full.device)
        full[rows[:, None], columns[None, :]] = weight
    return full.contiguous(memory_format=torch.channels_last)


def _constant(spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    live_bias = bias_of_live(spec, bias)

    def convolve(x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], spec.structure.out_channels, *spec.output_hw(x.shape[2:]))
        return y if live_bias is None else y.add_(live_bias[:, None, None])

    return convolve


def _uniform(spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    n_groups = len(weights)
    return lambda x: F.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation, n_groups)


def _single(spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    weight = zero_filled(spec, weights)
    live_bias = bias_of_live(spec, bias)
    return lambda x: F.conv2d(x, weight, live_bias, spec.stride, spec.padding, spec.dilation)


def _gathered(spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    read = torch.tensor(spec.structure.read, device=weights[0].device)
    weight = zero_filled(spec, weights)[:, read].contiguous(memory_format=torch.channels_last)
    live_bias = bias_of_live(spec, bias)
    return lambda x: F.conv2d(
        x.index_select(1, read), weight, live_bias, spec.stride, spec.padding, spec.dilation
    )


def _per_group(spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    device = weights[0].device
    branches = []
    for group, weight in zip(spec.structure.groups, weights, strict=True):
        in_index = torch.tensor(group.in_index, dtype=torch.long, device=device)
        out_index = torch.tensor(group.out_index, dtype=torch.long, device=device)
        branches.append((in_index, out_index, weight, None if bias is None else bias[out_index]))

    def convolve(x: Tensor) -> Tensor:
        shape = (x.shape[0], spec.structure.out_channels, *spec.output_hw(x.shape[2:]))
        y = torch.zeros(shape, dtype=x.dtype, device=x.device)
        y = y.contiguous(memory_format=memory_format_of(x))
        for in_index, out_index, weight, group_bias in branches:
            if weight.shape[1]:
                gathered = x.index_select(1, in_index)
                branch = F.conv2d(gathered, weight, group_bias, spec.stride, spec.padding, spec.dilation)
                y.index_copy_(1, out_index, branch)
            elif group_bias is not None:
                y[:, out_index] = group_bias[:, None, None]
        return y

    return convolve


_FORMS = {
    "constant": _constant,
    "uniform": _uniform,
    "single": _single,
    "gathered": _gathered,
    "per_group": _per_group,
}
