"""How many labelled images an engine gets right: what a precision costs stands beside what it gains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engines import Runner

__all__ = ["Labelled", "accuracy"]


@dataclass(frozen=True)
class Labelled:
    """images: (n, channels, height, width), float32, normalised as the network wants; labels: (n,), int64."""

    images: Tensor
    labels: Tensor


def accuracy(run: Runner, labelled: Labelled, batch: int) -> float:
    """The share (0..1) that ``run`` gets right; it is called with ``batch`` images each time."""
    right = 0
    device = labelled.images.device
    for images, labels in zip(labelled.images.split(batch), labelled.labels.split(batch), strict=True):
        # An engine built for one batch size takes no other: the last images are repeated and not counted.
        places = torch.arange(batch, device=device).clamp(max=len(images) - 1)
        found = run(images[places].contiguous())[: len(images)].argmax(1)
        right += int((found == labels).sum())
    return right / len(labelled.labels)
