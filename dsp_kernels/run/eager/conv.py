"""The op in plain PyTorch: runs everywhere, and is the fallback of every other backend.

``form_of`` picks one form per layer:
``constant``: no group reads anything;
``uniform``: an ordinary (grouped) convolution;
``single``: one convolution over all channels, with zeros where no group has weights;
``gathered``: the same over the channels that some group reads, gathered first;
``per_group``: gather, one convolution and scatter per group.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_kernels.op.activations import activate_
from dsp_kernels.op.dense import dense_weight, index_tensors, live_bias
from dsp_kernels.op.spec import ConvSpec, memory_format_of


class EagerBackend:
    """Plain PyTorch on any device and in any floating dtype."""

    name = "eager"

    def can_run(
        self, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: torch.memory_format
    ) -> tuple[bool, str]:
        return (True, "") if dtype.is_floating_point else (False, f"dtype {dtype} is not a floating dtype")

    def prepare(
        self, spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None
    ) -> Callable[[Tensor, Tensor | None], Tensor]:
        convolve = FORMS[form_of(spec)](spec, weights, bias)

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


def _constant(spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    added = live_bias(spec.structure, bias)

    def convolve(x: Tensor) -> Tensor:
        y = x.new_zeros(spec.output_shape(x.shape))
        return y if added is None else y.add_(added[:, None, None])

    return convolve


def _uniform(spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
    n_groups = len(weights)
    return lambda x: F.conv2d(x, weight, bias, spec.stride, spec.padding, spec.dilation, n_groups)


def _single(
    spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None, gathers: bool = False
) -> Callable[[Tensor], Tensor]:
    weight = dense_weight(spec.structure, weights, spec.kernel_size)
    read = torch.tensor(spec.structure.read, device=weight.device) if gathers else None
    weight = weight if read is None else weight[:, read]
    weight = weight.contiguous(memory_format=torch.channels_last)
    added = live_bias(spec.structure, bias)

    def convolve(x: Tensor) -> Tensor:
        gathered = x if read is None else x.index_select(1, read)
        return F.conv2d(gathered, weight, added, spec.stride, spec.padding, spec.dilation)

    return convolve


def _per_group(spec: ConvSpec, weights: Sequence[Tensor], bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    indices = index_tensors(spec.structure, weights[0].device)
    branches = [
        (in_index, out_index, weight, None if bias is None else bias[out_index])
        for in_index, out_index, weight in zip(*indices, weights, strict=True)
    ]

    def convolve(x: Tensor) -> Tensor:
        y = torch.zeros(spec.output_shape(x.shape), dtype=x.dtype, device=x.device)
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


# Name of a form -> (spec, weights, bias) -> the convolution x -> y, without residual and activation.
FORMS: dict[str, Callable[..., Callable[[Tensor], Tensor]]] = {
    "constant": _constant,
    "uniform": _uniform,
    "single": _single,
    "gathered": partial(_single, gathers=True),
    "per_group": _per_group,
}
