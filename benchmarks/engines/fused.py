"""The fused network: ``dsp_kernels.fuse``, one engine for each executor that this build has."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from dsp_kernels import fuse
from dsp_kernels.graph.network import trace
from dsp_kernels.program.planner import plan
from dsp_kernels.run.programs import EXECUTORS

from .base import Runner, cuda_available

__all__ = ["Fused", "fused_engines"]


@dataclass(frozen=True)
class Fused:
    """backend: the name of an executor, or "auto" for the choice that ``fuse`` makes itself."""

    name: str = "fused"
    backend: str = "auto"
    device: str = "any"
    dtype: torch.dtype = torch.float32
    slow_build: bool = False
    any_batch: bool = True

    def available(self) -> tuple[bool, str]:
        """Where the executor exists; whether it can run a network shows when that is known."""
        if self.backend != "auto" and self.backend not in EXECUTORS.names():
            return (
                False,
                f"this build has no executor {self.backend!r}; it has {', '.join(EXECUTORS.names())}",
            )
        if self.device == "cuda":
            return cuda_available()
        if self.dtype != torch.float32:
            return _runs(self.backend, self.dtype)
        return True, ""

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """model: a packed model, or any that can be traced. Raises DSPBackendError with the reason if not."""
        fused = fuse(model.eval(), example, backend=self.backend, dtype=self.dtype)

        def run(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return fused(x)

        return run


@cache
def _runs(backend: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether an executor takes a network of one convolution in this precision; if not, its reason."""
    program = plan(trace(nn.Sequential(nn.Conv2d(1, 1, 1)).eval(), torch.zeros(1, 1, 1, 1)))
    (executor,) = (executor for executor in EXECUTORS if executor.name == backend)
    return executor.can_run(program.map_tensors(lambda t: t.to(dtype)), dtype, torch.device("cpu"))


def fused_engines() -> tuple[Fused, ...]:
    """One engine for each executor, in their order of preference; in 16 bit too where that is faster."""
    made = []
    for name in EXECUTORS.names():
        if name in ("cuda", "triton"):
            made += [
                Fused(f"fused:{name}", name, device="cuda"),
                Fused(f"fused:{name}:fp16", name, device="cuda", dtype=torch.float16),
            ]
        else:
            made.append(Fused(f"fused:{name}", name))
    return (*made, Fused("fused:cpu:bf16", "cpu", device="cpu", dtype=torch.bfloat16))
