"""Learning rate schedules: a factor of the base learning rate for every epoch."""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int], float]  # epoch, counted from 0 -> factor


def multi_step(epochs: int, *, warmup_epochs: int = 0) -> Schedule:
    """1, 0.1 after half of the epochs and 0.01 after three quarters; 0.25 in the warm-up epochs.

    >>> factor = multi_step(100, warmup_epochs=2)
    >>> [round(factor(epoch), 4) for epoch in (0, 2, 50, 75)]
    [0.25, 1.0, 0.1, 0.01]
    """

    def factor(epoch: int) -> float:
        if epoch < warmup_epochs:
            return 0.25
        return 0.1 ** sum(epoch >= share * epochs for share in (0.5, 0.75))

    return factor


def cosine(epochs: int, *, cycles: int = 1) -> Schedule:
    """Half a cosine from 1 towards 0, repeated ``cycles`` times (Loshchilov and Hutter 2017).

    >>> factor = cosine(10, cycles=2)
    >>> [round(factor(epoch), 4) for epoch in (0, 4, 5)]
    [1.0, 0.0955, 1.0]
    """
    length = epochs / cycles
    return lambda epoch: 0.5 * (1 + math.cos(math.pi * (epoch % length) / length))
