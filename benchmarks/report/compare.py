"""Two results compared: has anything become slower, beyond what noise explains?"""

from dataclasses import dataclass

from dsp_kernels.errors import DSPError

from ..measure.environment import MACHINE_KEYS
from ..measure.samples import Samples, ratio_interval
from .results import Result

COLUMNS = ("what", "first ms", "second ms", "second : first", "99 % interval", "verdict")
# A smaller change is "same", however significant: two runs of one program on a quiet machine differ by up to
# 1.5 % in their medians because memory is allocated at other addresses.
_MIN_CHANGE = 0.03


@dataclass(frozen=True)
class Comparison:
    """One engine, network and batch size in both results.

    verdict: "slower", "faster", "same" or "no verdict: ..." if one of the two is unstable. cells: in COLUMNS;
    the ratio of times is a Hodges-Lehmann estimate.
    """

    verdict: str
    cells: tuple[str, ...]


def compare_samples(name: str, first: Samples, second: Samples) -> Comparison:
    """By the medians of rounds, as calls of one round are not independent of each other."""
    low, ratio, high = ratio_interval(first.rounds, second.rounds, 0.99)
    verdict = "same"
    if unstable := first.unstable or second.unstable:
        verdict = f"no verdict: {unstable}"
    elif abs(ratio - 1) > _MIN_CHANGE and not low <= 1 <= high:
        verdict = "slower" if ratio > 1 else "faster"
    medians = (f"{1e3 * samples.median:.3g}" for samples in (first, second))
    cells = (name, *medians, f"{ratio:.3f}", f"{low:.3f} to {high:.3f}", verdict)
    return Comparison(verdict, cells)


def compare_results(first: Result, second: Result, *, other_machine: bool = False) -> list[Comparison]:
    """Every engine that both have timed.

    Raises DSPError if the machines differ (unless ``other_machine``) or the results have nothing in common.
    """
    a, b = first.environment, second.environment
    differences = [
        f"{key}: {a.get(key)} and {b.get(key)}" for key in MACHINE_KEYS if a.get(key) != b.get(key)
    ]
    if differences and not other_machine:
        raise DSPError(
            f"the results come from different machines ({'; '.join(differences)}); "
            "--other-machine compares anyway"
        )
    ours, theirs = _timed(first), _timed(second)
    common = [key for key in ours if key in theirs]
    if not common:
        raise DSPError("the two results have no engine, network and batch size in common")
    return [compare_samples(key, ours[key], theirs[key]) for key in common]


def _timed(result: Result) -> dict[str, Samples]:
    return {
        f"{run.name} {run.mode} {row.engine} batch {row.batch}": row.samples
        for run in result.runs
        for row in run.rows
        if row.samples is not None
    }
