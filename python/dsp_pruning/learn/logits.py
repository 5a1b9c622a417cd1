"""The logits that live on the layers as ``<conv>.group``: their noise, and the optimizer that moves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError, DSPShapeError
from dsp_pruning.layers import LayerInfo

__all__ = [
    "attach_logits",
    "check_logits",
    "check_noise",
    "gumbel_noise",
    "logit_optimizer",
    "step_logits",
]

# Equal logits make the first hard groups a matter of rounding. This is one Adam step of the logits (lr 1e-3):
# enough to break every tie, and forgotten after a few steps; the Gumbel noise is a thousand times larger.
_INITIAL_LOGIT = 1e-3

_ADAM_BETAS, _ADAM_EPS = (0.9, 0.999), 1e-12


def check_logits(info: LayerInfo, n_groups: int) -> None:
    """Raise DSPPruningError if this layer has logits for another number of groups already."""
    shape, group = (n_groups, info.out_channels), getattr(info.conv, "group", None)
    if group is not None and (not isinstance(group, Tensor) or tuple(group.shape) != shape):
        found = f"shape {tuple(group.shape)}" if isinstance(group, Tensor) else f"type {type(group).__name__}"
        raise DSPPruningError(
            f"layer {info.name!r} already has a 'group' of {found}; n_groups={n_groups} needs shape {shape}"
        )


def attach_logits(info: LayerInfo, n_groups: int, generator: torch.Generator) -> nn.Parameter:
    """Make ``conv.group`` [n_groups, O] a parameter without gradient, at least float32.

    Values that are there already stay (a loaded checkpoint, or a pruner's buffer); new ones are drawn.
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
    shapes: Sequence[torch.Size], generator: torch.Generator, device: torch.device | None = None
) -> list[Tensor]:
    """Gumbel noise of every shape, float64 on ``device`` (None: the generator's), from one draw.

    Minus the logarithm of an exponential variable; the same for every device and dtype of the model.
    """
    sizes = [shape.numel() for shape in shapes]
    flat = torch.empty(sum(sizes), dtype=torch.float64, device=generator.device)
    flat.exponential_(generator=generator)
    flat.clamp_min_(torch.finfo(flat.dtype).tiny).log_().neg_()
    if device is not None:
        flat = flat.to(device, non_blocking=True)
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def check_noise(noise: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """Raise if ``noise`` is not one tensor for every layer name in ``shapes``, each of its shape."""
    if set(noise) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(noise)), sorted(set(noise) - set(shapes))
        raise DSPPruningError(f"noise needs one tensor for every layer: missing {missing}, unknown {unknown}")
    for name, shape in shapes.items():
        if noise[name].shape != shape:
            raise DSPShapeError(
                f"noise of layer {name!r} has shape {tuple(noise[name].shape)}; it must be {tuple(shape)}"
            )


def logit_optimizer(logits: Sequence[nn.Parameter], lr: float) -> torch.optim.Adam:
    """The logits' own Adam."""
    # Fused: the one that can be told by a tensor, not by the host, to leave a step out.
    return torch.optim.Adam(logits, lr, _ADAM_BETAS, _ADAM_EPS, fused=True, capturable=True)


def step_logits(
    optimizer: torch.optim.Adam, logits: Sequence[nn.Parameter], gradients: Sequence[Tensor], hold: Tensor
) -> None:
    """One step; outside it the logits have no gradient, so nothing else can move them.

    gradients: one for each of the logits. hold: float32 scalar, 1 to leave the step out.
    """
    optimizer.found_inf = hold  # type: ignore[attr-defined]
    try:
        for own, gradient in zip(logits, gradients, strict=True):
            own.grad = gradient
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
        optimizer.zero_grad(set_to_none=True)
