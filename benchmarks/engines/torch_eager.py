"""The network as an ordinary PyTorch module, nothing rewritten, in either memory layout."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import Runner, cuda_available

__all__ = ["TorchEager"]


@dataclass(frozen=True)
class TorchEager:
    """Plain PyTorch. channels_last, dtype: of weights and input, converted inside the timed call."""

    name: str = "torch"
    channels_last: bool = False
    device: str = "any"
    dtype: torch.dtype = torch.float32
    slow_build: bool = False
    any_batch: bool = True

    def available(self) -> tuple[bool, str]:
        """Always; on a GPU where torch finds one."""
        return cuda_available() if self.device == "cuda" else (True, "")

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """model: any module; example: unused, every input runs."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        # A copy: other engines run the same model in their own layout.
        network = copy.deepcopy(model).eval().to(self.dtype).to(memory_format=layout)

        def run(x: Tensor) -> Tensor:
            with torch.inference_mode():
                return network(x.to(self.dtype).contiguous(memory_format=layout)).float()

        return run
