"""How many labelled images an engine classifies correctly: what a precision costs, beside what it gains."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..engines import Runner


@dataclass(frozen=True)
class Labelled:
    """images: (n, channels, height, width), float32, normalised as in training; labels: (n,), int64."""

    images: Tensor
    labels: Tensor


def accuracy(run: Runner, labelled: Labelled, batch: int) -> float:
    """The share (0..1) of correct answers; ``run`` is called with ``batch`` images each time."""
    correct = 0
    for images, labels in zip(labelled.images.split(batch), labelled.labels.split(batch), strict=True):
        # An engine may be built for this batch size only: the last batch is padded with repeated images.
        places = torch.arange(batch, device=images.device).clamp(max=len(images) - 1)
        found = run(images[places].contiguous())[: len(images)].argmax(1)
        correct += int((found == labels).sum())
    return correct / len(labelled.labels)
