"""The one comparison of two answers to the same images: of a network and of what was made from it."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPVerificationError


def tensors_of(answer: Any) -> list[Tensor]:
    """All tensors of an answer: a tensor, or nested mappings, lists and tuples of tensors."""
    if isinstance(answer, Tensor):
        return [answer]
    if isinstance(answer, Mapping):
        answer = list(answer.values())
    if not isinstance(answer, list | tuple):
        return []
    return [tensor for part in answer for tensor in tensors_of(part)]


def largest_difference(expected: Any, got: Any) -> tuple[float, float]:
    """(largest absolute difference, largest absolute value of ``expected``), over all tensors of two answers.

    NaN where a number is NaN, so compare with ``not difference <= bound``.
    Raises DSPVerificationError for another number of tensors or other shapes.
    """
    pairs = tensors_of(expected), tensors_of(got)
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in pairs]
    if shapes[0] != shapes[1]:
        raise DSPVerificationError(f"the answer has shapes {shapes[1]}; expected {shapes[0]}")
    both = [(_wide(a), _wide(b.to(a.device))) for a, b in zip(*pairs, strict=True) if a.numel()]
    if not both:
        return 0.0, 0.0
    worst = torch.stack([torch.stack(((a - b).abs().max(), a.abs().max())).cpu() for a, b in both])
    difference, scale = worst.amax(0).tolist()
    return difference, scale


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def compare_answers(
    expected: Any,
    got: Any,
    bound: float,
    what: str,
    images: str,
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    slack: float = 0.0,
    advice: str = "",
) -> float:
    """The largest absolute difference of two answers, which are tensors or nested containers of tensors.

    bound: allowed difference relative to the largest absolute value of ``expected`` (``tolerances.py``).
    what, images: name both for the message, as "the fused network differs from the model", "random images".
    model: gave ``expected``; it is checked first (``check_finite``). dtype: the least precise one in use;
    below its smallest normal number nothing is compared. slack: allowed in addition, absolute.
    advice: ends the message.

    Raises DSPVerificationError where the answers differ by more, have other shapes or are not finite.
    """
    if model is not None:
        check_finite(model, tensors_of(expected), images)
    difference, scale = largest_difference(expected, got)
    allowed = bound * (scale if dtype is None else max(scale, torch.finfo(dtype).tiny)) + slack
    if not difference <= allowed:
        raise DSPVerificationError(
            f"{what} on {images} by {difference:.3g} (largest output {scale:.3g}, allowed {allowed:.3g})"
            f"{advice}"
        )
    return difference


def check_finite(model: nn.Module, answers: Iterable[Tensor], images: str) -> None:
    """Raise DSPVerificationError if an answer of ``model`` is not finite, naming a parameter that is not.

    images: what it answered, for the message.
    """
    if all(bool(answer.isfinite().all()) for answer in answers):
        return
    held = (*model.named_parameters(), *model.named_buffers())
    named = [name for name, tensor in held if not bool(torch.isfinite(tensor).all())]
    reason = f"{named[0]!r} is not finite" if named else "its parameters are finite, its sums are not"
    raise DSPVerificationError(
        f"{type(model).__name__} itself answers {images} with NaN or infinity, so nothing can be compared "
        f"with it: {reason}"
    )
