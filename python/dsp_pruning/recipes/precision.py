"""Mixed precision of a training run: autocast and loss scaling."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dsp_kernels.errors import DSPTrainingError

_NAMES = ("float32", "bfloat16", "float16")


class Precision:
    """dtype of forward and backward passes; weights, optimizer and batch norm stay float32.

    name: ``float16`` scales the loss and skips a step whose gradients overflow. device: of the model.
    Raises DSPTrainingError for an unknown name.
    """

    def __init__(self, name: str = "float32", device: torch.device | str = "cpu") -> None:
        if name not in _NAMES:
            raise DSPTrainingError(f"precision is {name!r}; expected one of {', '.join(_NAMES)}")
        self.device_type = torch.device(device).type
        self.dtype: torch.dtype = getattr(torch, name)
        self.mixed = name != "float32"
        self.scaler = torch.amp.GradScaler(self.device_type) if name == "float16" else None

    def autocast(self, enabled: bool = True) -> AbstractContextManager[None]:
        """Context of a forward pass. enabled=False sets only the dtype for autocast regions inside it."""
        # Without mixed precision not even a disabled autocast: on a CPU torch warns about float32.
        return torch.autocast(self.device_type, self.dtype, enabled) if self.mixed else nullcontext()

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Backward pass and optimizer step. Call ``update`` at the end of the iteration."""
        optimizer.zero_grad(set_to_none=True)
        if self.scaler is None:
            loss.backward()
            optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(optimizer)

    def update(self) -> None:
        """Update the loss scale, once per iteration and after the last use of the scaler."""
        if self.scaler is not None:
            self.scaler.update()
