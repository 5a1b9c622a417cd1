"""The logits on the layers, ``<conv>.group``: their initial values, their noise and their optimizer."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPShapeError
from dsp_pruning.checks import check_names
from dsp_pruning.layers import LayerInfo

# With equal logits rounding would decide the first hard groups. This is one Adam step at lr 1e-3: enough to
# break ties and forgotten after a few steps; the Gumbel noise is a thousand times larger.
_INITIAL_LOGIT = 1e-3


def attach_logits(info: LayerInfo, n_groups: int, generator: torch.Generator) -> nn.Parameter:
    """Make ``conv.group`` [n_groups, O] a parameter without gradient, in float32 or better.

    Existing values (a loaded checkpoint, a pruner's buffer) are kept; otherwise they are drawn.
    """
    weight = info.conv.weight
    values = getattr(info.conv, "group", None)
    if values is None:
        shape = (n_groups, info.out_channels)
        values = torch.empty(shape, dtype=torch.float64, device=generator.device)
        values.normal_(std=_INITIAL_LOGIT, generator=generator)
    else:
        del info.conv.group
    dtype = torch.promote_types(weight.dtype, torch.float32)
    logits = nn.Parameter(values.detach().to(weight.device, dtype), requires_grad=False)
    info.conv.register_parameter("group", logits)
    return logits


def gumbel_noise(
    shapes: Sequence[torch.Size], generator: torch.Generator, device: torch.device
) -> list[Tensor]:
    """Gumbel noise of every shape, float64 on ``device``, from one draw.

    Drawn on the generator's device, so it is the same for every device and dtype of the model.
    """
    sizes = [shape.numel() for shape in shapes]
    flat = torch.empty(sum(sizes), dtype=torch.float64, device=generator.device)
    flat.exponential_(generator=generator)
    flat.clamp_min_(torch.finfo(flat.dtype).tiny).log_().neg_()
    flat = flat.to(device, non_blocking=True)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def check_noise(noise: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise unless ``noise`` holds one tensor of the right shape for every layer name in ``shapes``."""
    check_names("noise needs one tensor", noise.keys(), shapes.keys())
    for name, shape in shapes.items():
        if noise[name].shape != shape:
            raise DSPShapeError(
                f"noise of layer {name!r} has shape {tuple(noise[name].shape)}; it must be {tuple(shape)}"
            )


def step_logits(
    optimizer: torch.optim.Adam, logits: Sequence[nn.Parameter], gradients: Sequence[Tensor], hold: Tensor
) -> None:
    """One step, skipped if the float32 scalar ``hold`` is 1."""
    # Outside of the step the logits have no gradient, so that no other optimizer moves them.
    optimizer.found_inf = hold  # type: ignore[attr-defined]
    try:
        for own, gradient in zip(logits, gradients, strict=True):
            own.grad = gradient
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)
