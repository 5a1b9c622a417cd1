"""The samples of one engine: quantiles, spread, and whether they allow a verdict."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_ROUNDS = 8
# A median is no verdict if its 95 % interval is wider than this share of it, or if the first and the second
# half of the run differ by more than this and by more than chance: something else was running.
_MOST_WIDTH, _MOST_DRIFT, _DRIFT_CHANCE = 0.15, 0.05, 1e-3


@dataclass(frozen=True)
class Samples:
    """Seconds of single calls, in the order in which they were taken.

    per_round: how many consecutive calls were taken in one round; they are not independent of each other.
    """

    seconds: tuple[float, ...]
    per_round: int = 1

    @property
    def n(self) -> int:
        """The number of samples."""
        return len(self.seconds)

    @property
    def rounds(self) -> tuple[float, ...]:
        """The median of each round; rounds are independent as far as the machine allows."""
        step = self.per_round
        return tuple(statistics.median(self.seconds[i : i + step]) for i in range(0, self.n, step))

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def quantile(self, share: float) -> float:
        """Seconds below which ``share`` (0..1) of the samples are, linear between neighbours."""
        return float(np.quantile(self.seconds, share))

    @property
    def variation(self) -> float:
        """Coefficient of variation: standard deviation over mean."""
        mean = statistics.fmean(self.seconds)
        return statistics.pstdev(self.seconds) / mean if mean else 0.0

    @property
    def unstable(self) -> str:
        """Why these samples allow no verdict; empty if they do."""
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


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the median from order statistics, without an assumption about the distribution.

    Normal approximation of the binomial ranks (Conover, Practical Nonparametric Statistics, section 3.2).
    """
    ordered = sorted(values)
    n = len(ordered)
    half = _deviations(confidence) * math.sqrt(n) / 2
    low = max(0, math.floor(n / 2 - half))
    high = min(n - 1, math.ceil(n / 2 + half) - 1)
    return ordered[low], ordered[max(low, high)]


def mann_whitney(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p-value that ``a`` and ``b`` come from one distribution.

    Normal approximation with the correction for ties and for continuity (Mann and Whitney 1947).
    """
    n, m = len(a), len(b)
    total = n + m
    if not n or not m:
        return 1.0
    _, place, counts = np.unique([*a, *b], return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal values share the middle of their ranks
    u = float(ranks[:n].sum()) - n * (n + 1) / 2
    ties = float((counts.astype(float) ** 3 - counts).sum())
    variance = n * m / 12 * (total + 1 - ties / (total * (total - 1)))
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
    rank = max(0, math.floor(n * m / 2 - _deviations(confidence) * math.sqrt(n * m * (n + m + 1) / 12)))
    low, high = shifts[rank], shifts[len(shifts) - 1 - rank]
    return math.exp(low), math.exp(statistics.median(shifts)), math.exp(high)


def _deviations(confidence: float) -> float:
    return statistics.NormalDist().inv_cdf((1 + confidence) / 2)
