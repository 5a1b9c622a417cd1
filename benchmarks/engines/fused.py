"""The fused network: ``dsp_kernels.fuse``, one engine for each executor that this build has."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsp_kernels import fuse
from dsp_kernels.executors import EXECUTORS

from .base import Runner

__all__ = ["Fused", "fused_engines"]


@dataclass(frozen=True)
class Fused:
    """backend: the name of an executor, or "auto" for the choice that ``fuse`` makes itself."""

    name: str = "fused"
    backend: str = "auto"
    device: str = "any"
    dtype: torch.dtype = torch.float32
    slow_build: bool = False

    def available(self) -> tuple[bool, str]:
        """Where the executor exists; whether it can run a network shows when that is known."""
        if self.backend != "auto" and self.backend not in EXECUTORS.names():
            return (
                False,
                f"this build has no executor {self.backend!r}; it has {', '.join(EXECUTORS.names())}",
            )
        return True, ""

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """model: a packed model, or any that can be traced. Raises DSPBackendError with the reason if not."""
        fused = fuse(model.eval(), example, backend=self.backend, dtype=self.dtype)

        def run(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return fused(x)

        return run


def fused_engines() -> tuple[Fused, ...]:
    """One engine for each executor, in their order of preference, and the native one in bfloat16."""
    each = (Fused(f"fused:{name}", name) for name in EXECUTORS.names())
    return (*each, Fused("fused:cpu-bf16", "cpu", device="cpu", dtype=torch.bfloat16))
