"""One line of a result: an engine on one form of a network at one batch size, measured or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .samples import Samples

__all__ = ["Row"]


@dataclass(frozen=True)
class Row:
    """engine: as shown, ``form/engine``; form, runner: its two parts.

    samples: None where nothing was timed; ``reason`` then says why, and ``status`` is "unavailable", "wrong"
    (a wrong answer), "failed" (it broke) or "skipped" (left out of a short plan); else "ok".
    difference, allowed: largest output difference from the reference and what rounding may make, absolute;
    difference is None where nothing was compared.
    build_seconds, peak_bytes: of preparing it and its first call. macs: useful multiply-adds of one image.
    accuracy: share of labelled images that are right; None where that was not counted. moved: bytes that must
    be read and written at least for this batch.
    floor: seconds that this machine needs at least for this batch; None where the peaks are not known.
    enqueue_seconds: on a GPU, of starting the work; device_seconds, cold_seconds: of the work itself there,
    without what Python needs to start it, with the L2 cache as the call before left it, and cold.
    """

    engine: str
    batch: int
    samples: Samples | None
    difference: float | None
    status: str = "ok"
    reason: str = ""
    form: str = ""
    runner: str = ""
    allowed: float | None = None
    build_seconds: float | None = None
    peak_bytes: int | None = None
    macs: int | None = None
    floor: float | None = None
    enqueue_seconds: float | None = None
    device_seconds: float | None = None
    cold_seconds: float | None = None
    accuracy: float | None = None
    moved: float | None = None

    @property
    def timed(self) -> Samples:
        """The samples. Raises ValueError where nothing was timed."""
        if self.samples is None:
            raise ValueError(f"{self.engine} was not timed: {self.reason}")
        return self.samples

    @property
    def of_floor(self) -> float | None:
        """The floor over the median: 1 is the speed of light."""
        if self.samples is None or self.floor is None or not self.samples.median:
            return None
        return self.floor / self.samples.median

    def as_json(self) -> dict[str, Any]:
        """Plain JSON with the raw samples; times in seconds."""
        found: dict[str, Any] = {
            "engine": self.engine,
            "form": self.form,
            "runner": self.runner,
            "batch": self.batch,
            "status": self.status,
            "reason": self.reason,
            "max_logit_difference": self.difference,
            "allowed_difference": self.allowed,
            "build_seconds": self.build_seconds,
            "peak_bytes": self.peak_bytes,
            "macs": self.macs,
            "floor": self.floor,
            "enqueue_seconds": self.enqueue_seconds,
            "device_seconds": self.device_seconds,
            "cold_seconds": self.cold_seconds,
            "accuracy": self.accuracy,
            "moved": self.moved,
        }
        if self.samples is not None:
            samples = self.samples
            found |= {
                "median": samples.median,
                "p10": samples.p10,
                "p90": samples.p90,
                "p99": samples.p99,
                "variation": samples.variation,
                "unstable": samples.unstable,
                "n": samples.n,
                "per_round": samples.per_round,
                "seconds": [float(f"{second:.6g}") for second in samples.seconds],
            }
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The row that ``as_json`` wrote. Raises KeyError or TypeError for another mapping."""
        seconds = data.get("seconds")
        return cls(
            engine=data["engine"],
            batch=data["batch"],
            samples=None if seconds is None else Samples(tuple(seconds), data["per_round"]),
            difference=data["max_logit_difference"],
            allowed=data["allowed_difference"],
            device_seconds=data.get("device_seconds"),  # not in the oldest files
            **{key: data[key] for key in _PLAIN},
        )


_PLAIN = (
    "status",
    "reason",
    "form",
    "runner",
    "build_seconds",
    "peak_bytes",
    "macs",
    "floor",
    "enqueue_seconds",
    "cold_seconds",
    "accuracy",
    "moved",
)
