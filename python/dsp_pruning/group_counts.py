"""How many groups each layer has: one number for all, a number for each, or numbers by name pattern."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.layers import LayerInfo

__all__ = ["GroupCount", "by_pattern", "groups_of_layers", "named_counts"]

GroupCount = int | Mapping[str, int] | Callable[[str, nn.Conv2d], int]


def groups_of_layers(infos: Sequence[LayerInfo], n_groups: GroupCount) -> list[int]:
    """G of every layer, from one number, a mapping by name or ``(name, conv) -> G``.

    Raises DSPPruningError for a number below 1 or above the layer's filters, or a mapping that lacks a layer
    or names another one.
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
    for info, count in zip(infos, counts, strict=True):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            where = "" if isinstance(n_groups, int | float) else f" for layer {info.name!r}"
            raise DSPPruningError(f"n_groups is {count!r}{where}; it must be a whole number of at least 1")
        if count > info.out_channels:
            raise DSPPruningError(
                f"layer {info.name!r} has {info.out_channels} filters, too few for n_groups={count}; take "
                f"n_groups <= {info.out_channels} or leave the layer out by layers="
            )
    return counts


def named_counts(
    infos: Sequence[LayerInfo], n_groups: GroupCount, counts: Sequence[int]
) -> int | dict[str, int]:
    """What a wrapper keeps of ``n_groups``: the number, or the number of every layer; both can be pickled."""
    if isinstance(n_groups, int):
        return n_groups
    return {info.name: count for info, count in zip(infos, counts, strict=True)}


def by_pattern(groups: int, patterns: Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """``groups`` for every layer, but for those whose name fits a pattern the number of the last that fits.

    patterns: as of a shell, ``stage_3.*`` -> G. names: of the layers that learn.
    Raises DSPPruningError for a pattern that fits no layer.
    """
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise DSPPruningError(
                f"the pattern {pattern!r} fits none of the {len(names)} layers that learn groups, which are "
                f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            )
    counts = dict.fromkeys(names, groups)
    for pattern, count in patterns.items():
        counts |= {name: count for name in names if fnmatchcase(name, pattern)}
    return counts
