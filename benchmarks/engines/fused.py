"""The fused network: ``dsp_kernels.fuse``, by the executor that it chooses or by a named one."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from dsp_kernels import fuse
from dsp_kernels.run.programs import EXECUTORS

from ..measure.floors import program_of
from .base import Engine, Runner


@dataclass(frozen=True)
class Fused(Engine):
    """backend: the name of an executor, or "auto" for the one that ``fuse`` chooses."""

    backend: str = "auto"
    any_batch: bool = True

    def available(self) -> tuple[bool, str]:
        """Whether the executor exists; whether it can run a network is known when it is prepared."""
        if self.backend != "auto" and self.backend not in EXECUTORS.names():
            known = ", ".join(EXECUTORS.names())
            return False, f"this build has no executor {self.backend!r}; it has {known}"
        if self.device != "cuda" and self.dtype != torch.float32:
            return _runs(self.backend, self.dtype)
        return super().available()

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """model: a packed model, or any that can be traced. Raises DSPBackendError if it cannot run."""
        fused = fuse(model.eval(), example, backend=self.backend, dtype=self.dtype)

        def run(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return fused(x)

        return run


@cache
def _runs(backend: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Whether an executor runs a network of one convolution in this precision; if not, why."""
    program = program_of(nn.Sequential(nn.Conv2d(1, 1, 1)).eval(), torch.zeros(1, 1, 1, 1))
    (executor,) = (executor for executor in EXECUTORS if executor.name == backend)
    return executor.can_run(program.map_tensors(lambda t: t.to(dtype)), dtype, torch.device("cpu"))


def fused_engines() -> tuple[Fused, ...]:
    """One engine per executor, in order of preference; 16-bit ones too where that can be faster."""
    made = [Fused("fused")]
    for name in EXECUTORS.names():
        device = "cuda" if name in ("cuda", "triton", "cudnn") else "any"
        made.append(Fused(f"fused:{name}", device=device, backend=name))
        if device == "cuda":
            made.append(Fused(f"fused:{name}:fp16", torch.float16, device, backend=name))
    return (*made, Fused("fused:cpu:bf16", torch.bfloat16, "cpu", backend="cpu"))
