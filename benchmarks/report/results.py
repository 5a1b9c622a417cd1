"""Result files: JSON with every raw sample, the machine and the software."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.whole_file import write_text

from ..measure.environment import environment
from ..measure.samples import Samples

__all__ = [
    "Result",
    "Row",
    "Run",
    "read_result",
    "write_json",
    "write_result",
]

_FORMAT = 1


@dataclass(frozen=True)
class Run:
    """One network. name: as it was asked for; label: what it is; mode: "latency" or "throughput";
    flop_ratio: multiply-adds of the dense network over those of the pruned one, the ideal speed-up.
    """

    name: str
    label: str
    mode: str
    flop_ratio: float | None
    rows: tuple[Row, ...]

    @property
    def batches(self) -> list[int]:
        """Batch sizes, ascending."""
        return sorted({row.batch for row in self.rows})

    def baseline(self, batch: int) -> Row | None:
        """What speed-ups are against: the fastest dense float32 engine, else the first that was timed."""
        timed = [row for row in self.rows if row.batch == batch and row.samples is not None]
        dense = [row for row in timed if row.form == "dense" and not row.runner.endswith(("bf16", "fp16"))]
        if dense:
            return min(dense, key=lambda row: row.timed.median)
        return timed[0] if timed else None

    def speed_up(self, row: Row) -> float | None:
        """How many times as fast as the baseline of its batch size; None where not both were timed."""
        base = self.baseline(row.batch)
        if base is None or row.samples is None:
            return None
        return base.timed.median / row.samples.median

    def ideal(self, row: Row) -> float | None:
        """The speed-up that the FLOPs alone promise for this row's form."""
        return 1.0 if row.form == "dense" else self.flop_ratio


@dataclass(frozen=True)
class Result:
    """What one command measured. environment: see there; peaks: ``Peaks.as_json()`` or None."""

    environment: dict[str, Any]
    peaks: dict[str, Any] | None
    runs: tuple[Run, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        runs = [
            {
                "name": run.name,
                "label": run.label,
                "mode": run.mode,
                "flop_ratio": run.flop_ratio,
                "rows": [row.as_json() for row in run.rows],
            }
            for run in self.runs
        ]
        return {"format": _FORMAT, "environment": self.environment, "peaks": self.peaks, "runs": runs}


def write_result(path: Path, result: Result) -> Path:
    """Write it, whole or not at all; samples stand on one line each."""
    text = json.dumps(result.as_json(), indent=1)
    return write_text(path, _short_lists(text) + "\n")


def read_result(path: str | Path) -> Result:
    """Read a result file. Raises DSPFormatError where it is none."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise DSPFormatError(f"{path} has format {data['format']!r}; this version reads {_FORMAT}")
        runs = tuple(
            Run(
                run["name"],
                run["label"],
                run["mode"],
                run["flop_ratio"],
                tuple(Row.from_json(row) for row in run["rows"]),
            )
            for run in data["runs"]
        )
        return Result(data["environment"], data["peaks"], runs)
    except FileNotFoundError as error:
        raise DSPFormatError(f"{path}: no such file") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DSPFormatError):
            raise
        raise DSPFormatError(f"{path} is not a result of these benchmarks: {error!r}") from error


def write_json(path: Path, rows: Sequence[Row], device: str = "cpu", net: str = "") -> Path:
    """A result file of one network."""
    run = Run(net, net, "latency", None, tuple(rows))
    return write_result(path, Result(environment(device), None, (run,)))


def _short_lists(text: str) -> str:
    """Lists of numbers on one line: thousands of samples would be thousands of lines."""
    lines: list[str] = []
    inside: list[str] | None = None
    for line in text.splitlines():
        if inside is not None:
            inside.append(line.strip())
            if line.strip().startswith("]"):
                lines.append("".join(inside))
                inside = None
        elif line.endswith('"seconds": ['):
            inside = [line]
        else:
            lines.append(line)
    return "\n".join(lines)


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
