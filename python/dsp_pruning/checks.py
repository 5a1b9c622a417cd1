"""What group learning relies on: settings within their range, values that are finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from dsp_kernels.errors import DSPPruningError, DSPTrainingError

__all__ = ["SecondOrder", "all_finite", "check_learning_settings", "raise_first_not_finite"]

SecondOrder = Literal["exact", "none", "original"]


def check_learning_settings(
    optimizer: Optimizer,
    reg: float,
    total_steps: int,
    n_groups: int,
    temp: float,
    group_optimizer_lr: float,
    second_order: str,
) -> None:
    """Raise DSPPruningError for the first setting of a GroupWrapper that is impossible."""
    for name, count in (("total_steps", total_steps), ("n_groups", n_groups)):
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise DSPPruningError(f"{name} is {count!r}; it must be a whole number of at least 1")
    if not (math.isfinite(reg) and reg >= 0):
        raise DSPPruningError(f"reg is {reg!r}; it must be a finite number of at least 0")
    for name, number in (("temp", temp), ("group_optimizer_lr", group_optimizer_lr)):
        if not (math.isfinite(number) and number > 0):
            raise DSPPruningError(f"{name} is {number!r}; it must be a finite number above 0")
    if second_order not in get_args(SecondOrder):
        choices = ", ".join(get_args(SecondOrder))
        raise DSPPruningError(f"second_order is {second_order!r}; it must be one of {choices}")
    if second_order != "none" and isinstance(optimizer, torch.optim.LBFGS):
        raise DSPPruningError(
            "LBFGS needs a closure, so the look-ahead cannot step it; use second_order='none'"
        )


def all_finite(tensors: Iterable[Tensor | None]) -> bool:
    """Are all values finite? One question to the device, where asking for each tensor would wait for each."""
    flags = [torch.isfinite(tensor).all() for tensor in tensors if tensor is not None]
    return not flags or bool(torch.stack(flags).all())


def raise_first_not_finite(suspects: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Raise DSPTrainingError with the name of the first tensor that holds a NaN or an infinity."""
    for name, value in suspects:
        if not all_finite([value]):
            raise DSPTrainingError(
                f"{name} is NaN or infinite at step {step}; the learning rate may be too large, or the "
                "batch, the noise or the loss of an earlier step was not finite"
            )
