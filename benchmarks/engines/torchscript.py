"""TorchScript: as the authors ship their networks (traced, nothing else), or optimised for inference."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import Runner

__all__ = ["TorchScript"]

# The profiling executor specialises in its first calls; they belong to the build.
_SPECIALISING_CALLS = 3


@dataclass(frozen=True)
class TorchScript:
    """optimize: apply ``torch.jit.optimize_for_inference`` (norms folded, weights laid out)."""

    name: str = "torchscript"
    optimize: bool = False
    device: str = "any"
    dtype: torch.dtype = torch.float32
    slow_build: bool = False
    any_batch: bool = True

    def available(self) -> tuple[bool, str]:
        """Wherever torch still has TorchScript."""
        if not hasattr(torch.jit, "trace") or not hasattr(torch.jit, "optimize_for_inference"):
            return False, "this torch has no TorchScript"
        return True, ""

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """model: any module that torch.jit.trace follows; example: of the batch size that will be run."""
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer torch calls TorchScript deprecated; the authors ship it
            traced = torch.jit.trace(copy.deepcopy(model).eval(), example, check_trace=False)
            if self.optimize:
                traced = torch.jit.optimize_for_inference(torch.jit.freeze(traced))

        def run(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return traced(x)

        for _ in range(_SPECIALISING_CALLS):
            run(example)
        return run
