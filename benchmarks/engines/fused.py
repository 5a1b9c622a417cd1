"""The fused network: ``dsp_kernels.fuse`` with the backend that it chooses itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsp_kernels import fuse


def available() -> tuple[bool, str]:
    """Always: the eager executor needs only torch."""
    return True, ""


def prepare(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """model: a packed model; example: an input of the batch size that will be run."""
    fused = fuse(model.eval(), example)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return fused(x)

    return run
