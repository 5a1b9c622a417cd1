"""Result files: JSON with every sample, the machine and the software."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dsp_kernels.errors import DSPFormatError
from dsp_kernels.whole_file import write_text

from ..measure.samples import Samples

_FORMAT = 1
_KEYS = {
    "difference": "max_logit_difference",
    "allowed": "allowed_difference",
}  # where a file differs from Row


@dataclass(frozen=True)
class Row:
    """One form of a network in one engine at one batch size.

    engine: as shown, ``form/runner``. status: "ok", or, with a ``reason``, "unavailable", "wrong" (a wrong
    answer), "failed" (it broke) or "skipped" (no time). samples: None if it was not timed.
    difference: largest difference from the reference's output, None if not compared; allowed: its bound.
    build_seconds: of preparing it. macs: useful multiply-adds of one image. moved: bytes that this batch must
    read and write. floor: the least seconds for this batch on this machine, None without measured peaks.
    device_seconds, cold_seconds: on a GPU between two events, with the L2 cache as the previous call left it,
    and flushed; enqueue_seconds: until the call returns to Python. accuracy: of labelled images, if counted.
    """

    engine: str
    batch: int
    samples: Samples | None = None
    difference: float | None = None
    status: str = "ok"
    reason: str = ""
    form: str = ""
    runner: str = ""
    allowed: float | None = None
    build_seconds: float | None = None
    macs: int | None = None
    floor: float | None = None
    enqueue_seconds: float | None = None
    device_seconds: float | None = None
    cold_seconds: float | None = None
    accuracy: float | None = None
    moved: float | None = None

    @property
    def timed(self) -> Samples:
        """The samples. Raises ValueError if the row was not timed."""
        if self.samples is None:
            raise ValueError(f"{self.engine} was not timed: {self.reason}")
        return self.samples

    @property
    def of_floor(self) -> float | None:
        """The floor over the median; above 1 with fewer multiplications than the floor counts."""
        if self.samples is None or self.floor is None or not self.samples.median:
            return None
        return self.floor / self.samples.median

    def as_json(self) -> dict[str, Any]:
        """Plain JSON with the samples; times in seconds."""
        found = {_KEYS.get(name, name): getattr(self, name) for name in _PLAIN}
        if (samples := self.samples) is not None:
            names = ("median", "unstable", "n", "per_round", "busy")
            found |= {name: getattr(samples, name) for name in names}
            found["seconds"] = [float(f"{second:.6g}") for second in samples.seconds]
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """The row that ``as_json`` wrote. Raises KeyError or TypeError for another mapping."""
        seconds = data.get("seconds")
        samples = None if seconds is None else Samples(tuple(seconds), data["per_round"], data.get("busy"))
        plain = {name: data[key] for name in _PLAIN if (key := _KEYS.get(name, name)) in data}
        return cls(samples=samples, **plain)


_PLAIN = tuple(field.name for field in fields(Row) if field.name != "samples")


@dataclass(frozen=True)
class Run:
    """One network in one mode ("latency" or "throughput").

    name: as on the command line; label: as in titles. flop_ratio: multiply-adds of the dense network over
    those of the pruned one, the ideal speed-up.
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
        """The fastest dense float32 engine, else the first that was timed; speed-ups are against it."""
        timed = [row for row in self.rows if row.batch == batch and row.samples is not None]
        dense = [
            row
            for row in timed
            if row.form == "dense" and not row.runner.endswith(("bf16", "fp16", "tf32", "int8"))
        ]
        if dense:
            return min(dense, key=lambda row: row.timed.median)
        return timed[0] if timed else None

    def speed_up(self, row: Row) -> float | None:
        """How many times as fast as the baseline of its batch size; None unless both were timed."""
        base = self.baseline(row.batch)
        if base is None or row.samples is None:
            return None
        return base.timed.median / row.samples.median

    def ideal(self, row: Row) -> float | None:
        """The speed-up that the FLOPs alone promise for this row's form."""
        return 1.0 if row.form == "dense" else self.flop_ratio


@dataclass(frozen=True)
class Result:
    """What one command measured. peaks: the fields of ``Peaks``, or None."""

    environment: dict[str, Any]
    peaks: dict[str, Any] | None
    runs: tuple[Run, ...]


def write_result(path: Path, result: Result) -> Path:
    """Write a result file, completely or not at all; the samples of a row are on one line."""
    runs = [vars(run) | {"rows": [row.as_json() for row in run.rows]} for run in result.runs]
    data = {"format": _FORMAT, "environment": result.environment, "peaks": result.peaks, "runs": runs}
    text = json.dumps(data, indent=1)
    text = re.sub(r'"seconds": \[[^\]]*\]', lambda samples: re.sub(r"\n *", "", samples[0]), text)
    return write_text(path, text + "\n")


def read_result(path: str | Path) -> Result:
    """Read a result file. Raises DSPFormatError if it is not one."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
        if data["format"] != _FORMAT:
            raise ValueError(f"format {data['format']!r}; this version reads {_FORMAT}")
        runs = tuple(
            Run(**run | {"rows": tuple(Row.from_json(row) for row in run["rows"])}) for run in data["runs"]
        )
        return Result(data["environment"], data["peaks"], runs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DSPFormatError(f"{path} is not a result of these benchmarks: {error!r}") from error
