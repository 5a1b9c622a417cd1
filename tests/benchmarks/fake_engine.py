"""An engine that is right, wrong or broken, as a test asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from dsp_benchmarks.measure.timing import TimingRules
from torch import Tensor, nn

QUICK = TimingRules(rounds=2, warmup=0.0, gap=0.0, burst=0.0)


@dataclass(frozen=True)
class FakeEngine:
    """The packed network with an error added to its answer; counts its calls."""

    error: float
    calls: list[int]
    name: str = "fake"
    device: str = "any"
    dtype: torch.dtype = torch.float32
    slow_build: bool = False
    any_batch: bool = False

    def available(self) -> tuple[bool, str]:
        return True, ""

    def prepare(self, model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
        if self.error == float("inf"):
            raise RuntimeError("the vendor's library broke")

        def run(x: Tensor) -> Tensor:
            self.calls.append(1)
            with torch.no_grad():
                return model(x) + self.error

        return run
