"""A fake clock, a small result, and a network that takes milliseconds, for the tests of the benchmarks."""

import time

import pytest
from dsp_benchmarks.report.results import Result, Run
from dsp_benchmarks.subjects.networks import Network, load_network
from fakes import ENVIRONMENT, PEAKS, SMALL, Clock, made_row


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return clock


@pytest.fixture
def result() -> Result:
    rows = [
        made_row("dense", "torch", 1, 8e-3),
        made_row("dense", "torch", 8, 64e-3),
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
