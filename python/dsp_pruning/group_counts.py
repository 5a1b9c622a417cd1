"""How many groups each layer has, for learning and for pruning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.layers import LayerInfo

GroupCount = int | Mapping[str, int] | Callable[[str, nn.Conv2d], int]


def groups_of_layers(layers: Sequence[LayerInfo], n_groups: GroupCount) -> dict[str, int]:
    """Layer name -> number of groups, from one number, a mapping by name or ``(name, conv) -> number``.

    Raises DSPPruningError for a number below 1 or above the layer's filters, and for a mapping whose keys
    are not exactly the names of the layers.
    """
    names = {layer.name for layer in layers}
    if isinstance(n_groups, Mapping):
        if set(n_groups) != names:
            missing, unknown = sorted(names - set(n_groups)), sorted(set(n_groups) - names)
            raise DSPPruningError(
                f"n_groups needs one number for every layer: missing {missing}, unknown {unknown}"
            )
        counts = {layer.name: n_groups[layer.name] for layer in layers}
    elif callable(n_groups):
        counts = {layer.name: n_groups(layer.name, layer.conv) for layer in layers}
    else:
        counts = {layer.name: n_groups for layer in layers}
    for layer in layers:
        count = counts[layer.name]
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            where = "" if isinstance(n_groups, int | float) else f" for layer {layer.name!r}"
            raise DSPPruningError(f"n_groups is {count!r}{where}; expected an integer of at least 1")
        if count > layer.out_channels:
            raise DSPPruningError(
                f"layer {layer.name!r} has {layer.out_channels} filters, too few for n_groups={count}; use "
                f"n_groups <= {layer.out_channels} or exclude the layer with layers="
            )
    return counts


def by_pattern(groups: int, patterns: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """Layer name -> the number of the last matching pattern, or ``groups`` where none matches.

    patterns: shell patterns such as ``stage_3.*`` -> number of groups. names: the layers that learn groups.
    Raises DSPPruningError for a pattern that matches no layer.
    """
    counts = dict.fromkeys(names, groups)
    for pattern, count in patterns.items():
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise DSPPruningError(
                f"the pattern {pattern!r} fits none of the {len(names)} layers that learn groups: "
                f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            )
        counts |= dict.fromkeys(matching, count)
    return counts


def check_existing(layer: LayerInfo, name: str, shape: tuple[int, ...]) -> None:
    """Raise DSPPruningError if the conv has an attribute ``name`` that is not a tensor of this shape."""
    value = getattr(layer.conv, name, None)
    if value is not None and (not isinstance(value, Tensor) or tuple(value.shape) != shape):
        found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"type {type(value).__name__}"
        raise DSPPruningError(
            f"layer {layer.name!r} already has a {name!r} of {found}; this n_groups needs shape {shape}"
        )
