"""An engine whose answer is right, wrong or an exception, and a clock that a test moves."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from dsp_benchmarks.engines import Engine, Runner
from dsp_benchmarks.measure.timing import TimingRules
from torch import Tensor, nn

QUICK = TimingRules(rounds=2, warmup=0.0, gap=0.0, burst=0.0)


@dataclass(frozen=True)
class FakeEngine(Engine):
    """The network with an error added to its output; inf: it cannot be built. Counts its calls."""

    name: str = "fake"
    error: float = 0.0
    calls: list[int] = field(default_factory=list)

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        if self.error == float("inf"):
            raise RuntimeError("the vendor's library broke")

        def run(x: Tensor) -> Tensor:
            self.calls.append(1)
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
