"""A small result, and a network that takes milliseconds, for the tests of the benchmarks."""

from __future__ import annotations

import random
from typing import Any

import pytest
from dsp_benchmarks.networks import Network, NetworkSource, load_network
from dsp_benchmarks.results import Result, Run
from dsp_benchmarks.rows import Row
from dsp_benchmarks.samples import Samples

ENVIRONMENT: dict[str, Any] = {
    "time": "2026-01-02T03:04:05+00:00",
    "torch": "2.15.0",
    "packages": {"openvino": "2026.4.1"},
    "commit": "0123456789ab",
    "processor": "A processor",
    "cores": 2,
    "threads": 2,
    "cpu_capability": "AVX512",
    "device": "cpu",
}
PEAKS: dict[str, Any] = {
    "flops": {"float32": 4e11},
    "bandwidth": 3e10,
    "launch": 0.0,
    "threads": 2,
    "how": {},
}


def made_samples(median: float, rounds: int = 20, per_round: int = 3, seed: int = 0) -> Samples:
    """Quiet samples: 1 % of normal noise."""
    noise = random.Random(seed)
    return Samples(tuple(median * noise.gauss(1, 0.01) for _ in range(rounds * per_round)), per_round)


def made_row(form: str, runner: str, batch: int, median: float | None, **more: Any) -> Row:
    if median is None:
        more = {"status": "unavailable", "reason": "the package x | y is missing"} | more
        return Row(f"{form}/{runner}", batch, None, None, form=form, runner=runner, **more)
    samples = made_samples(median)
    more = {
        "macs": 10**7,
        "moved": 1e6 + 1e4 * batch,
        "floor": median / 4,
        "build_seconds": 0.5,
        "peak_bytes": 2**20,
        "allowed": 1e-4,
    } | more
    return Row(f"{form}/{runner}", batch, samples, 1e-6, form=form, runner=runner, **more)


@pytest.fixture
def result() -> Result:
    rows = [made_row("dense", "torch", batch, 8e-3 * batch) for batch in (1, 8)] + [
        made_row("dense", "openvino", 1, 4e-3),
        made_row("dense", "openvino", 8, 30e-3),
        made_row("dense", "openvino-bf16", 1, 1e-3),
        made_row("dense", "tensorrt", 1, None),
        made_row("packed", "fused:eager", 1, 2e-3),
        made_row("packed", "fused:eager", 8, 10e-3),
        made_row("packed", "fused:cpu", 1, 1e-3),
        made_row("packed", "fused:cpu", 8, 5e-3),
        made_row("packed", "compile", 1, None, status="skipped", reason="takes long"),
    ]
    run = Run("resnet56_g4", "resnet56_g4, real weights", "latency", 2.5, tuple(rows))
    return Result(ENVIRONMENT, PEAKS, (run,))


@pytest.fixture(scope="session")
def network() -> Network:
    """A pruned ResNet-8 on 16 x 16 images."""
    return load_network(SMALL)


SMALL = NetworkSource("cifar_resnet8", "random:g=2,rate=0.6", 16)
