"""The fused network: ``dsp_kernels.fuse``, by the executor that it chooses or by a named one."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsp_kernels import fuse
from dsp_kernels.run.programs import EXECUTORS

from .base import Engine, Runner


@dataclass(frozen=True)
class Fused(Engine):
    """backend: the name of an executor, or "auto" for the one that ``fuse`` chooses."""

    backend: str = "auto"
    any_batch: bool = True

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        fused = fuse(model.eval(), example, backend=self.backend, dtype=self.dtype)
        return torch.inference_mode()(fused)


def fused_engines() -> tuple[Fused, ...]:
    """One engine per executor, in order of preference; further precisions where they can be faster."""
    made = [Fused("fused")]
    for name in EXECUTORS.names():
        if name not in ("cuda", "triton", "cudnn"):
            made.append(Fused(f"fused:{name}", backend=name))
            continue
        made.append(Fused(f"fused:{name}", device="cuda", backend=name))
        made.append(Fused(f"fused:{name}:tf32", device="cuda", tf32=True, backend=name))
        made.append(Fused(f"fused:{name}:fp16", torch.float16, "cuda", backend=name))
    return (*made, Fused("fused:cpu:bf16", torch.bfloat16, "cpu", backend="cpu"))
