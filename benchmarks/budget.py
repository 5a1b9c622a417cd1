"""A stated time for a whole run, shared among its parts; what one part leaves, the next ones get."""

from __future__ import annotations

import time
from collections.abc import Sequence

__all__ = ["Budget"]


class Budget:
    """seconds: for everything, from now on; None: no limit. weights: of the parts in order, positive."""

    def __init__(self, seconds: float | None, weights: Sequence[float]) -> None:
        self.seconds = seconds
        self._end = None if seconds is None else time.perf_counter() + seconds
        self._weights = list(weights)

    def next_part(self) -> float | None:
        """Seconds for the part that begins now: its weight's share of what is left, 0 where nothing is."""
        weight, left = self._weights[0], sum(self._weights)
        del self._weights[0]
        if self._end is None:
            return None
        return max(0.0, self._end - time.perf_counter()) * weight / left
