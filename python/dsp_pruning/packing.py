"""pack(model, example_input): from a masked dense network to one of small grouped convolutions, exactly."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPVerificationError
from dsp_kernels.planner import zero_padding
from dsp_kernels.tolerances import network_tolerance
from dsp_kernels.trace import evaluating, trace
from dsp_pruning.packing_plan import LayerPlan, plan_layers

__all__ = ["pack"]


def pack(model: nn.Module, example_input: Tensor) -> nn.Module:
    """A copy of a pruned network in which nothing that the masks removed is left.

    example_input: (batch, channels, height, width) of the sizes that the network is made for.

    Every pruned convolution becomes a PackedConv2d with one group per set of channels that filters read.
    Channels that are zero, or that nobody reads, disappear from batch norms, linear layers and residual
    streams too. A removed channel is exactly zero in eval mode; where a pruned filter leaves another
    constant (a norm's shift, a bias), the channel is kept. The copy is an ordinary module in the model's
    own mode. It trains as the masked network does, with the same statistics, if pruned filters have norms
    of weight and bias 0, which is how PruneWrapper leaves them. The model is not changed.

    Raises DSPTraceError, naming the node, if the network holds an operation whose channels cannot be
    followed, and DSPVerificationError if the copy does not answer as the masked network does.
    """
    masked = _masked_copy(model)
    packed = copy.deepcopy(masked)
    plans = plan_layers(trace(packed, example_input))
    for path, plan in plans.items():
        parent, _, name = path.rpartition(".")
        setattr(packed.get_submodule(parent), name, _rebuild(packed.get_submodule(path), plan))
    _verify(masked, packed, example_input)
    return packed


def _masked_copy(model: nn.Module) -> nn.Module:
    """A copy whose convolutions are multiplied by their masks and carry neither mask nor group any more."""
    masked = copy.deepcopy(model)
    for module in masked.modules():
        mask = getattr(module, "mask", None)
        if isinstance(module, nn.Conv2d) and isinstance(mask, Tensor):
            with torch.no_grad():
                module.weight.masked_fill_(mask.eq(0), 0.0)
    return masked


def _rebuild(module: nn.Module, plan: LayerPlan) -> nn.Module:
    if isinstance(module, nn.BatchNorm2d):
        return _batch_norm(module, plan)
    if isinstance(module, nn.Linear):
        return _linear(module, plan)
    assert isinstance(module, nn.Conv2d | PackedConv2d)
    return _convolution(module, plan)


def _batch_norm(norm: nn.BatchNorm2d, plan: LayerPlan) -> nn.BatchNorm2d:
    if len(plan.out_keep) == norm.num_features:
        return norm
    keep = list(plan.out_keep)
    assert norm.running_mean is not None
    made = nn.BatchNorm2d(
        len(keep),
        norm.eps,
        norm.momentum,
        norm.affine,
        device=norm.running_mean.device,
        dtype=norm.running_mean.dtype,
    )
    state = {
        name: value if name == "num_batches_tracked" else value[keep]
        for name, value in norm.state_dict().items()
    }
    made.load_state_dict(state)
    return made.train(norm.training)


def _linear(linear: nn.Linear, plan: LayerPlan) -> nn.Linear:
    if len(plan.in_keep) == linear.in_features:
        return linear
    linear.in_features = len(plan.in_keep)
    linear.weight = nn.Parameter(linear.weight.detach()[:, list(plan.in_keep)], linear.weight.requires_grad)
    return linear


def _convolution(conv: nn.Conv2d | PackedConv2d, plan: LayerPlan) -> nn.Module:
    structure = plan.structure
    whole = len(plan.in_keep) == conv.in_channels and len(plan.out_keep) == conv.out_channels
    if structure is None or (whole and structure.is_dense):
        for name in ("group", "mask"):
            if hasattr(conv, name):
                delattr(conv, name)
        return conv
    padding = zero_padding(conv) if isinstance(conv, nn.Conv2d) else conv.padding
    assert not isinstance(padding, str)
    weight = conv.weight.detach() if isinstance(conv, nn.Conv2d) else _dense_weight(conv)
    made = PackedConv2d(
        structure,
        conv.kernel_size,
        conv.stride,
        padding,
        conv.dilation,
        bias=conv.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    rows = torch.tensor(plan.out_keep, device=weight.device)
    columns = torch.tensor(plan.in_keep, device=weight.device)
    with torch.no_grad():
        for group, branch in zip(structure.groups, made.weights, strict=True):
            kept_columns = columns[torch.tensor(group.in_index, dtype=torch.long)]
            branch.copy_(weight[rows[list(group.out_index)][:, None], kept_columns])
        if made.bias is not None and conv.bias is not None:
            made.bias.copy_(conv.bias[rows])
    return made.train(conv.training)


def _dense_weight(conv: PackedConv2d) -> Tensor:
    """(out_channels, in_channels, kh, kw) with zeros where no kernel lives."""
    structure = conv.structure
    reference = conv.weights[0] if len(conv.weights) else torch.empty(0)
    dense = reference.new_zeros(structure.out_channels, structure.in_channels, *conv.kernel_size)
    for group, branch in zip(structure.groups, conv.weights, strict=True):
        columns = torch.tensor(group.in_index, dtype=torch.long)
        dense[torch.tensor(group.out_index)[:, None], columns] = branch.detach()
    return dense


def _verify(masked: nn.Module, packed: nn.Module, example_input: Tensor) -> None:
    """Compare on the example and on random images: an example of zeros would hide a wrong channel."""
    noise = torch.randn(example_input.shape, generator=torch.Generator().manual_seed(0)).to(example_input)
    convolutions = [module for module in masked.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    reduction = max((module.weight[0].numel() for module in convolutions), default=1)
    bound = network_tolerance(example_input.dtype, reduction, len(convolutions))
    with evaluating(masked), evaluating(packed), torch.no_grad():
        for what, x in (("the example input", example_input), ("random images", noise)):
            expected, got = masked(x), packed(x)
            scale, error = expected.abs().max().item(), (expected - got).abs().max().item()
            if not error <= bound * scale:
                raise DSPVerificationError(
                    f"the packed network differs from the masked one on {what} by {error:.3g} (largest "
                    f"output {scale:.3g}, allowed {bound * scale:.3g}); it was not packed"
                )
