"""Engines side by side on one network: first each must give the right answer, then it is timed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPBackendError, DSPVerificationError
from dsp_pruning import build_released

from .engines import ENGINES, Runner
from .environment import environment
from .released_form import ReleasedNetwork, read_arrays
from .timing import Progress, Samples, measure

__all__ = ["TOLERANCE", "Row", "bench_released", "check", "time_runners", "write_json"]

# Largest difference of a logit that float32 rounding may make: measured 9e-6 on ResNet-56 g=4, batch 128.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Row:
    """One engine at one batch size. difference: largest logit difference; None where nothing was compared."""

    engine: str
    batch: int
    samples: Samples
    difference: float | None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON with the raw samples; times in seconds."""
        return {
            "engine": self.engine,
            "batch": self.batch,
            "median": self.samples.median,
            "p10": self.samples.p10,
            "p90": self.samples.p90,
            "n": self.samples.n,
            "max_logit_difference": self.difference,
            "seconds": list(self.samples.seconds),
        }


def check(name: str, run: Runner, x: Tensor, expected: Tensor, tolerance: float = TOLERANCE) -> float:
    """Largest difference between what ``run`` gives for ``x`` and ``expected``, both (batch, classes).

    Raises DSPVerificationError where it is above ``tolerance``, not a number, or of another shape.
    """
    got = run(x)
    if got.shape != expected.shape:
        raise DSPVerificationError(
            f"engine {name!r} gives shape {tuple(got.shape)}, it must be {tuple(expected.shape)}"
        )
    difference = float((got.float() - expected.float()).abs().max()) if got.numel() else 0.0
    if not difference <= tolerance:
        raise DSPVerificationError(
            f"engine {name!r} is off by {difference:g}, at most {tolerance:g} is right: it is not timed"
        )
    return difference


def time_runners(
    runners: Mapping[str, Runner],
    x: Tensor,
    expected: Tensor,
    *,
    unchecked: Sequence[str] = (),
    rounds: int = 30,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Row]:
    """Check every runner on ``x``, then time all of them side by side.

    x: (batch, channels, height, width); expected: (batch, classes).
    unchecked: runners that are another network, shown for their speed alone.
    Raises DSPVerificationError before anything is timed.
    """
    differences = {
        name: None if name in unchecked else check(name, run, x, expected) for name, run in runners.items()
    }
    calls = {name: _call(run, x) for name, run in runners.items()}
    synchronize = torch.cuda.synchronize if x.is_cuda else None
    samples = measure(calls, rounds=rounds, seed=seed, synchronize=synchronize, progress=progress)
    return [Row(name, len(x), samples[name], differences[name]) for name in runners]


def bench_released(
    path: str | Path,
    batches: Sequence[int],
    engines: Sequence[str] = tuple(ENGINES),
    *,
    rounds: int = 30,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Row]:
    """Time a released network (.npz) in every engine; all are held against the packed model.

    Raises DSPBackendError for an engine that cannot run here, DSPFormatError for a bad file.
    """
    arrays, meta = read_arrays(path)
    packed = build_released(arrays, meta).eval().to(device)
    models: dict[str, nn.Module] = {"released": ReleasedNetwork(arrays, meta).to(device)}
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for batch in batches:
        x = torch.randn(batch, 3, 32, 32, generator=generator).to(device)
        with torch.inference_mode():
            expected = packed(x)
        runners = {name: _prepare(name, models.get(name, packed), x) for name in engines}
        rows += time_runners(runners, x, expected, rounds=rounds, seed=seed, progress=progress)
    return rows


def write_json(path: Path, rows: Sequence[Row], device: str = "cpu", **about: Any) -> Path:
    """Write rows, raw samples and the environment, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**about, "environment": environment(device), "rows": [row.as_json() for row in rows]}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def _prepare(name: str, model: nn.Module, x: Tensor) -> Runner:
    if name not in ENGINES:
        raise DSPBackendError(f"unknown engine {name!r}; known are {', '.join(ENGINES)}")
    can_run, reason = ENGINES[name].available()
    if not can_run:
        raise DSPBackendError(f"engine {name!r} cannot run here: {reason}")
    return ENGINES[name].prepare(model, x)


def _call(run: Runner, x: Tensor) -> Callable[[], Tensor]:
    return lambda: run(x)
