"""Detecting NaN, infinity and overflow in a training step without making the host wait for the GPU."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.errors import DSPTrainingError
from dsp_pruning import distributed


class NonFiniteFlag:
    """Records on the device whether any value was not finite, with a copy in host memory.

    The host reads its copy (pinned for a GPU) without synchronising: on the CPU it is always up to date, on a
    GPU it may lag some steps behind.
    """

    def __init__(self) -> None:
        self._flag: Tensor | None = None
        self._host: Tensor | None = None
        self._view: Any = None  # of the host's copy; reading it dispatches no operation

    def __getstate__(self) -> dict[str, Any]:
        return {"_flag": None, "_host": None, "_view": None}

    def hold(self, values: Sequence[Tensor], overflow: Tensor | None) -> Tensor:
        """Bool scalar: hold this step back. Records values that are not finite without an overflow (1)."""
        first = values[0]
        bad = ~torch.stack([value.sum().to(first) for value in values]).sum().isfinite()
        if self._flag is None or self._host is None or self._flag.device != bad.device:
            self._flag = torch.zeros((), device=bad.device)
            self._host = torch.zeros((), pin_memory=bad.device.type == "cuda")
            self._view = self._host.numpy()
        self._flag.add_(bad if overflow is None else bad & (overflow == 0))
        self._host.copy_(self._flag, non_blocking=True)
        return bad if overflow is None else bad | (overflow > 0)

    def seen(self) -> bool:
        """Does the host know of a value that was not finite?"""
        return self._view is not None and bool(self._view != 0)

    def wait(self) -> bool:
        """Was any recorded value not finite? Waits for the device."""
        return self._flag is not None and bool(self._flag.item() != 0)

    def clear(self) -> None:
        self._flag = self._host = self._view = None


def overflowed(stepped: bool, found: Iterable[Tensor | None], device: torch.device) -> Tensor:
    """Float32 scalar: 1 if a process's optimizer took no step, or one of the scalars ``found`` is 1."""
    skip = torch.full((), float(not stepped), device=device)
    for one in found:
        if one is not None:
            skip = torch.maximum(skip, one.to(skip).reshape(()))
    distributed.all_reduce_max(skip)
    return skip


def raise_first_not_finite(suspects: Iterable[tuple[str, Tensor]], step: int) -> None:
    """Raise DSPTrainingError that names the first tensor with a NaN or an infinity."""
    bad = (name for name, value in suspects if not bool(torch.isfinite(value).all()))
    raise DSPTrainingError(
        f"{next(bad, 'the logit gradient')} is NaN or infinite at step {step}; the learning rate may be too "
        "large, or the batch, the noise or the loss of an earlier step was not finite"
    )
