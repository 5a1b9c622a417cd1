"""The samples of one engine: quantiles, spread, and whether they allow a verdict."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FEWEST_ROUNDS = 8
# A median is no verdict if its 95 % interval is wider than this share of it, or if the first and the second
# half of the run differ by more than this and by more than chance: something else was running.
_MOST_WIDTH, _MOST_DRIFT, _DRIFT_CONFIDENCE = 0.15, 0.05, 0.999


@dataclass(frozen=True)
class Samples:
    """Seconds of single calls, in the order in which they were taken.

    per_round: how many consecutive calls were taken in one round; they are not independent of each other.
    busy: mean time of a fixed computation just before and after the calls over its best; None if not taken.
    """

    seconds: tuple[float, ...]
    per_round: int = 1
    busy: float | None = None

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
        low, drift, high = ratio_interval(rounds[:half], rounds[-half:], _DRIFT_CONFIDENCE)
        if abs(drift - 1) > _MOST_DRIFT and not low <= 1 <= high:
            return f"drifted by {100 * abs(drift - 1):.0f} % during the run"
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


def ratio_interval(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """(low, estimate, high) of b / a: the Hodges-Lehmann shift of logarithms, with its U-test interval.

    All ratios are possible, (0, estimate, infinity), if there are too few values for that confidence.
    """
    shifts = sorted(math.log(y / x) for x in a for y in b)
    n, m = len(a), len(b)
    rank = math.floor(n * m / 2 - _deviations(confidence) * math.sqrt(n * m * (n + m + 1) / 12))
    estimate = math.exp(statistics.median(shifts))
    if rank < 0:
        return 0.0, estimate, math.inf
    return math.exp(shifts[rank]), estimate, math.exp(shifts[-1 - rank])


def _deviations(confidence: float) -> float:
    return statistics.NormalDist().inv_cdf((1 + confidence) / 2)
