"""The samples of one engine and what they say: quantiles, spread, and whether they say anything at all."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from .statistics import mann_whitney, median_interval, quantile

__all__ = ["FEWEST_ROUNDS", "Samples"]

# A median is no verdict when its 95 % interval is wider than this part of it, or when the first and the
# second half of the run differ by more than this and by more than chance: the machine did something else.
_MOST_WIDTH, _MOST_DRIFT, _DRIFT_CHANCE, FEWEST_ROUNDS = 0.15, 0.05, 1e-3, 8


@dataclass(frozen=True)
class Samples:
    """Seconds of single calls, in the order in which they were taken.

    per_round: how many neighbouring calls were taken in one round; they are not independent of each other.
    """

    seconds: tuple[float, ...]
    per_round: int = 1

    @property
    def n(self) -> int:
        """How many samples there are."""
        return len(self.seconds)

    @property
    def rounds(self) -> tuple[float, ...]:
        """The median of each round: independent of each other as far as the machine allows."""
        step = self.per_round
        return tuple(statistics.median(self.seconds[i : i + step]) for i in range(0, self.n, step))

    @property
    def median(self) -> float:
        """The middle of the samples, in seconds."""
        return statistics.median(self.seconds)

    @property
    def p10(self) -> float:
        """A tenth of the samples is not above it."""
        return quantile(self.seconds, 0.1)

    @property
    def p90(self) -> float:
        """Nine tenths of the samples are not above it."""
        return quantile(self.seconds, 0.9)

    @property
    def p99(self) -> float:
        """99 % of the samples are not above it."""
        return quantile(self.seconds, 0.99)

    @property
    def variation(self) -> float:
        """Coefficient of variation: standard deviation over mean."""
        mean = statistics.fmean(self.seconds)
        return statistics.pstdev(self.seconds) / mean if mean else 0.0

    @property
    def unstable(self) -> str:
        """Why these samples give no verdict; empty where they do."""
        rounds = self.rounds
        if len(rounds) < FEWEST_ROUNDS:
            return f"only {len(rounds)} rounds, {FEWEST_ROUNDS} are needed"
        middle = statistics.median(rounds)
        if not middle:
            return ""
        low, high = median_interval(rounds)
        if high - low > _MOST_WIDTH * middle:
            return f"the median is known only within {100 * (high - low) / middle:.0f} %"
        half = len(rounds) // 2
        drift = abs(statistics.median(rounds[:half]) - statistics.median(rounds[-half:])) / middle
        if drift > _MOST_DRIFT and mann_whitney(rounds[:half], rounds[-half:]) < _DRIFT_CHANCE:
            return f"drifted by {100 * drift:.0f} % during the run"
        return ""
