"""The fused network: ``dsp_kernels.fuse``, by the executor that it chooses or by a named one."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsp_kernels import FusedNetwork, fuse, quantize
from dsp_kernels.run.programs import EXECUTORS

from .base import Engine, Runner


@dataclass(frozen=True)
class Fused(Engine):
    """backend: the name of an executor, or "auto" for the one that ``fuse`` chooses."""

    backend: str = "auto"
    any_batch: bool = True

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        return torch.inference_mode()(self.fused(model, example))

    def fused(self, model: nn.Module, example: Tensor) -> FusedNetwork:
        """For int8 a network that is not quantised is quantised first."""
        if self.dtype != torch.int8:
            return fuse(model.eval(), example, backend=self.backend, dtype=self.dtype)
        images = example if self.images is None else self.images
        quantized = model if isinstance(model, FusedNetwork) else quantize(model.eval(), images)
        return fuse(quantized, example, backend=self.backend)


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
    narrow = {"bf16": torch.bfloat16, "fp16": torch.float16, "int8": torch.int8}
    made += [Fused(f"fused:cpu:{name}", dtype, "cpu", backend="cpu") for name, dtype in narrow.items()]
    return tuple(made)
