"""The logits that live on the layers as ``<conv>.group``, and the Gumbel noise that is added to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError, DSPShapeError
from dsp_pruning.layers import LayerInfo

__all__ = [
    "GroupCount",
    "at_least_float",
    "attach_logits",
    "check_logits",
    "check_noise",
    "groups_of_layers",
    "gumbel_noise",
]

GroupCount = int | Mapping[str, int] | Callable[[str, nn.Conv2d], int]

# Equal logits make the first hard groups a matter of rounding. This is one Adam step of the logits (lr 1e-3):
# enough to break every tie, and forgotten after a few steps; the Gumbel noise is a thousand times larger.
_INITIAL_LOGIT = 1e-3


def groups_of_layers(infos: Sequence[LayerInfo], n_groups: GroupCount) -> list[int]:
    """G of every layer, from one number, a mapping by name or ``(name, conv) -> G``.

    Raises DSPPruningError for a number below 1, or a mapping that lacks a layer or names another one.
    """
    names = [info.name for info in infos]
    if isinstance(n_groups, Mapping):
        if set(n_groups) != set(names):
            missing, unknown = sorted(set(names) - set(n_groups)), sorted(set(n_groups) - set(names))
            raise DSPPruningError(
                f"n_groups needs one number for every layer: missing {missing}, unknown {unknown}"
            )
        counts = [n_groups[name] for name in names]
    elif callable(n_groups):
        counts = [n_groups(info.name, info.conv) for info in infos]
    else:
        counts = [n_groups] * len(names)
    for name, count in zip(names, counts, strict=True):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            where = "" if isinstance(n_groups, int | float) else f" for layer {name!r}"
            raise DSPPruningError(f"n_groups is {count!r}{where}; it must be a whole number of at least 1")
    return counts


def check_logits(info: LayerInfo, n_groups: int) -> None:
    """Raise DSPPruningError if this layer cannot have ``n_groups`` groups or has other logits already."""
    if n_groups > info.out_channels:
        raise DSPPruningError(
            f"layer {info.name!r} has {info.out_channels} filters, too few for n_groups={n_groups}; take "
            f"n_groups <= {info.out_channels} or leave the layer out by layers="
        )
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


def at_least_float(values: Tensor) -> Tensor:
    """The values in float32 or better: half precision has no room for tiny probabilities."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
