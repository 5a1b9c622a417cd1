"""The way in which the authors ship and run their networks: branches, traced to TorchScript."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPShapeError

from ..released_form import ReleasedNetwork


def available() -> tuple[bool, str]:
    """Wherever torch still has TorchScript."""
    return (True, "") if hasattr(torch.jit, "trace") else (False, "this torch has no torch.jit.trace")


def prepare(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """model: a ReleasedNetwork; example: an input of the batch size that will be run.

    Raises DSPShapeError for any other module: the form of execution is the point of this engine.
    """
    if not isinstance(model, ReleasedNetwork):
        raise DSPShapeError(f"engine 'released' runs a ReleasedNetwork, not {type(model).__name__}")
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer torch calls TorchScript deprecated; the authors ship it
        traced = torch.jit.trace(model.eval(), example, check_trace=False)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return traced(x)

    return run
