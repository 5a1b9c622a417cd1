"""Made-up results, a small network's name, an engine that may be wrong, and a clock that a test moves."""

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from dsp_benchmarks.engines import Engine, Runner
from dsp_benchmarks.measure.samples import Samples
from dsp_benchmarks.measure.timing import TimingRules
from dsp_benchmarks.report.results import Row
from dsp_benchmarks.subjects.networks import NetworkSource
from torch import Tensor, nn

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
PEAKS: dict[str, Any] = {"flops": {"float32": 4e11}, "bandwidth": 3e10, "launch": 0.0}


def made_samples(median: float, rounds: int = 20, per_round: int = 3, seed: int = 0) -> Samples:
    """Quiet samples: 1 % of normal noise."""
    noise = random.Random(seed)
    return Samples(tuple(median * noise.gauss(1, 0.01) for _ in range(rounds * per_round)), per_round)


def made_row(form: str, runner: str, batch: int, median: float | None, **more: Any) -> Row:
    if median is None:
        more = {"status": "unavailable", "reason": "the package x | y is missing"} | more
        return Row(f"{form}/{runner}", batch, None, None, form=form, runner=runner, **more)
    samples = made_samples(median)
    more = {"macs": 10**7, "moved": 1e6 + 1e4 * batch, "floor": median / 4, "build_seconds": 0.5} | more
    return Row(f"{form}/{runner}", batch, samples, 1e-6, form=form, runner=runner, **more)


SMALL = NetworkSource("cifar_resnet8", "random:g=2,rate=0.6", 16)
QUICK = TimingRules(rounds=2, warmup=0.0, gap=0.0, burst=0.0)


@dataclass(frozen=True)
class FakeEngine(Engine):
    """The network with an error added to its output; inf: it cannot be built. calls: devices of inputs."""

    name: str = "fake"
    error: float = 0.0
    calls: list[str] = field(default_factory=list)

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        if self.error == float("inf"):
            raise RuntimeError("the vendor's library broke")

        def run(x: Tensor) -> Tensor:
            self.calls.append(x.device.type)
            with torch.no_grad():
                return model(x) + self.error

        return run


class Clock:
    """Time passes only when a test or a sleep says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def spend(self, seconds: float) -> None:
        self.now += seconds

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.spend(seconds)
