"""The samples of one engine and what they say: quantiles, spread, and whether they say anything at all."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = [
    "FEWEST_ROUNDS",
    "Samples",
    "mann_whitney",
    "median_interval",
    "quantile",
    "ratio_interval",
]

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


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0..1) of them lie, linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the median from order statistics: no assumption about the distribution.

    Normal approximation of the binomial ranks (Conover, Practical Nonparametric Statistics, section 3.2).
    """
    ordered = sorted(values)
    n = len(ordered)
    half = statistics.NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(n) / 2
    low = max(0, math.floor(n / 2 - half))
    high = min(n - 1, math.ceil(n / 2 + half) - 1)
    return ordered[low], ordered[max(low, high)]


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value that ``a`` and ``b`` come from one distribution.

    Normal approximation with the correction for ties and for continuity (Mann and Whitney 1947).
    """
    n, m = len(a), len(b)
    if not n or not m:
        return 1.0
    ranks, ties = _ranks([*a, *b])
    u = sum(ranks[:n]) - n * (n + 1) / 2
    total = n + m
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1))) if total > 1 else 0.0
    if variance <= 0:
        return 1.0
    z = max(0.0, abs(u - n * m / 2) - 0.5) / math.sqrt(variance)
    return 2 * (1 - statistics.NormalDist().cdf(z))


def ratio_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """(low, estimate, high) of b / a: the Hodges-Lehmann shift of logarithms, with its U-test interval."""
    shifts = sorted(math.log(y / x) for x in a for y in b)
    n, m = len(a), len(b)
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    rank = max(0, math.floor(n * m / 2 - z * math.sqrt(n * m * (n + m + 1) / 12)))
    low, high = shifts[rank], shifts[len(shifts) - 1 - rank]
    return math.exp(low), math.exp(statistics.median(shifts)), math.exp(high)


def _ranks(values: Sequence[float]) -> tuple[list[float], float]:
    """Mid-ranks from 1, and the sum of t^3 - t over groups of t equal values."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    ties = 0.0
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            ranks[place] = (start + end) / 2 + 1
        size = end - start + 1
        ties += size**3 - size
        start = end + 1
    return ranks, ties
