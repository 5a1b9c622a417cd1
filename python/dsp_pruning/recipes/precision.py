"""Mixed precision of a training run: autocast and the scaling of the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from torch import Tensor

from dsp_kernels.errors import DSPTrainingError

__all__ = ["Precision", "PrecisionName"]

PrecisionName = Literal["float32", "bfloat16", "float16"]


class Precision:
    """How forward and backward passes compute; weights, optimizer and batch norm stay float32.

    name: ``float16`` scales the loss, and an overflow skips the step. device: of the model.
    Raises DSPTrainingError for another name.
    """

    def __init__(self, name: str = "float32", device: torch.device | str = "cpu") -> None:
        if name not in get_args(PrecisionName):
            raise DSPTrainingError(
                f"precision is {name!r}; expected one of {', '.join(get_args(PrecisionName))}"
            )
        self.device_type = torch.device(device).type
        self.dtype: torch.dtype = getattr(torch, name)
        self.mixed = name != "float32"
        self.scaler = torch.amp.GradScaler(self.device_type) if name == "float16" else None

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The forward pass runs in here."""
        with self._autocast(True):
            yield

    @contextmanager
    def named(self) -> Iterator[None]:
        """Autocast is off in here, but torch knows the dtype for whoever turns it on."""
        with self._autocast(False):
            yield

    def _autocast(self, enabled: bool) -> AbstractContextManager[None]:
        # Not even disabled for float32: torch warns of that dtype on a CPU.
        return torch.autocast(self.device_type, self.dtype, enabled) if self.mixed else nullcontext()

    def step(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Backward pass and optimizer step, scaled if need be. The scaler is not updated yet."""
        optimizer.zero_grad(set_to_none=True)
        if self.scaler is None:
            loss.backward()
            optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            self.scaler.step(optimizer)

    def update(self) -> None:
        """The one update of the scaler in an iteration, after everything that used it."""
        if self.scaler is not None:
            self.scaler.update()
