"""How the learning rate moves over the epochs of a run."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["Schedule", "cosine", "multi_step"]

# Share of the base learning rate in an epoch, counted from 0.
Schedule = Callable[[int], float]

# The first epochs of a schedule with a warm-up run at a quarter of the base rate.
_WARMUP_FACTOR = 0.25


def multi_step(
    epochs: int, *, milestones: tuple[float, ...] = (0.5, 0.75), gamma: float = 0.1, warmup_epochs: int = 0
) -> Schedule:
    """Times ``gamma`` at each share of the epochs in ``milestones``; a quarter in the warm-up epochs."""

    def factor(epoch: int) -> float:
        if epoch < warmup_epochs:
            return _WARMUP_FACTOR
        return gamma ** sum(epoch >= share * epochs for share in milestones)

    return factor


def cosine(epochs: int, *, cycles: int = 1, warmup_epochs: int = 0) -> Schedule:
    """Half a cosine from 1 towards 0 in each of ``cycles`` equal parts; a quarter in the warm-up epochs."""
    length = epochs / cycles

    def factor(epoch: int) -> float:
        if epoch < warmup_epochs:
            return _WARMUP_FACTOR
        return 0.5 * (1 + math.cos(math.pi * (epoch % length) / length))

    return factor
