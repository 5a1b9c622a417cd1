"""Whether a network answers with numbers at all, before two answers are compared."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPVerificationError

__all__ = ["check_finite"]


def check_finite(model: nn.Module, answers: Iterable[Tensor], what: str) -> None:
    """Raise DSPVerificationError, naming what is not finite in ``model``, where its own answer is not.

    what: the images that it answered.
    """
    if all(bool(answer.isfinite().all()) for answer in answers):
        return
    held = (*model.named_parameters(), *model.named_buffers())
    named = [name for name, tensor in held if not bool(torch.isfinite(tensor).all())]
    reason = f"{named[0]!r} is not finite" if named else "its parameters are finite, its sums are not"
    raise DSPVerificationError(
        f"{type(model).__name__} itself answers {what} with NaN or infinity, so nothing can be compared with "
        f"it: {reason}"
    )
