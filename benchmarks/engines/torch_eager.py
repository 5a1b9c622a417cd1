"""The network as an ordinary PyTorch module, nothing rewritten."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def available() -> tuple[bool, str]:
    """Always."""
    return True, ""


def prepare(model: nn.Module, example: Tensor) -> Callable[[Tensor], Tensor]:
    """model: any module, put in eval mode; example: unused, every input runs."""
    model.eval()

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run
