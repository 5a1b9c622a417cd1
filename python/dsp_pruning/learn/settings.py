"""What group learning relies on: settings within their range, values that are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPPruningError, DSPTrainingError
from dsp_pruning import distributed
from dsp_pruning.layers import LayerInfo

__all__ = [
    "GroupCount",
    "NonFiniteFlag",
    "SecondOrder",
    "by_pattern",
    "check_kind",
    "check_learning_settings",
    "groups_of_layers",
    "held_back",
    "named_counts",
    "raise_first_not_finite",
]

SecondOrder = Literal["exact", "none", "original"]


def check_learning_settings(
    reg: float, total_steps: int, temp: float, group_optimizer_lr: float, second_order: str
) -> None:
    """Raise DSPPruningError for the first setting of a GroupWrapper that is impossible."""
    if not isinstance(total_steps, int) or isinstance(total_steps, bool) or total_steps < 1:
        raise DSPPruningError(f"total_steps is {total_steps!r}; it must be a whole number of at least 1")
    if not (_is_finite(reg) and reg >= 0):
        raise DSPPruningError(f"reg is {reg!r}; it must be a finite number of at least 0")
    for name, number in (("temp", temp), ("group_optimizer_lr", group_optimizer_lr)):
        if not (_is_finite(number) and number > 0):
            raise DSPPruningError(f"{name} is {number!r}; it must be a finite number above 0")
    if second_order not in get_args(SecondOrder):
        choices = ", ".join(get_args(SecondOrder))
        raise DSPPruningError(f"second_order is {second_order!r}; it must be one of {choices}")


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def check_kind(**given: tuple[Any, Any, str]) -> None:
    """Raise DSPPruningError for the first name=(value, kinds, kinds in words) that is none of its kinds."""
    for name, (value, kinds, words) in given.items():
        if not isinstance(value, kinds):
            raise DSPPruningError(f"{name} is a {type(value).__name__}; it must be {words}")


class NonFiniteFlag:
    """Remembers that a value was not finite, and can be asked without making the host wait for the device.

    The device writes into memory of the host (pinned for a GPU), which is read as it is: on the CPU that is
    the state of now, on a GPU that of what has been computed so far, so the answer may come some steps late.
    """

    def __init__(self) -> None:
        self._flag: Tensor | None = None
        self._host: Tensor | None = None
        self._view: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_flag": None, "_host": None, "_view": None}

    def note(self, bad: Tensor) -> None:
        """bad: a bool scalar on the device."""
        if self._flag is None or self._host is None or self._flag.device != bad.device:
            self._flag = torch.zeros((), device=bad.device)
            self._host = torch.zeros((), pin_memory=bad.device.type == "cuda")
            self._view = self._host.numpy()
        self._flag.add_(bad)
        self._host.copy_(self._flag, non_blocking=True)

    def hold(self, values: Sequence[Tensor], skip: Tensor | None) -> Tensor:
        """Bool scalar: nothing may move, after an overflow or a value that is not finite. Notes the latter.

        skip: float scalar, 1 after an overflow; None without a scaler.
        """
        first = values[0]
        bad = ~torch.stack([value.sum().to(first) for value in values]).sum().isfinite()
        hold = bad if skip is None else bad | (skip > 0)
        self.note(bad if skip is None else bad & (skip == 0))
        return hold

    def seen(self) -> bool:
        """Has the host seen it yet?"""
        return self._view is not None and bool(self._view != 0)

    def wait(self) -> bool:
        """Was any value that was noted so far not finite? Waits for the device."""
        return self._flag is not None and bool(self._flag.item() != 0)

    def clear(self) -> None:
        """Forget what was noted."""
        self._flag = self._host = self._view = None


def held_back(stepped: bool, found: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Float32 scalar: 1 if the scaler kept back a step, or a look-ahead overflowed, on any process.

    stepped: the optimizer of this process took its step. found: scalars that are 1 after an overflow.
    """
    skip = torch.full((), float(not stepped), device=device)
    for one in found:
        if one is not None:
            skip = torch.maximum(skip, one.to(skip).reshape(()))
    distributed.all_reduce_max(skip)
    return skip


def raise_first_not_finite(suspects: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Raise DSPTrainingError, with the name of the first tensor that holds a NaN or an infinity."""
    name = next(
        (name for name, value in suspects if not bool(torch.isfinite(value).all())), "the logit gradient"
    )
    raise DSPTrainingError(
        f"{name} is NaN or infinite at step {step}; the learning rate may be too large, or the "
        "batch, the noise or the loss of an earlier step was not finite"
    )


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
