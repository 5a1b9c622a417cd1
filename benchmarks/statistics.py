"""What may be said about two sets of samples: quantiles, intervals, the U-test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

__all__ = ["mann_whitney", "median_interval", "quantile", "ratio_interval"]


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
