"""Accuracy and loss of a network on a split of a data set."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsp_kernels.graph.network import evaluating
from dsp_pruning.data import FolderSplit, Split, TrainingData, evaluation_batches
from dsp_pruning.distributed import all_reduce_mean, rank, world_size

__all__ = ["Score", "evaluate"]


@dataclass(frozen=True)
class Score:
    """accuracy: 0..1. loss: mean cross-entropy in nats. n: number of images."""

    accuracy: float
    loss: float
    n: int


@torch.inference_mode()
def evaluate(model: Callable[[Tensor], Tensor], data: TrainingData, split: Split | FolderSplit) -> Score:
    """Score a network on a split.

    model: images float32 (batch, channels, height, width) -> logits (batch, classes). A module runs in eval
    mode and gets its previous mode back. Collective: with several processes each scores its share of the
    images, and all get the same result.
    """
    correct, loss = 0, 0.0
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        for images, labels in evaluation_batches(data, split, rank=rank(), world_size=world_size()):
            logits = model(images).float()
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    sums = torch.tensor([correct, loss], dtype=torch.float64)
    all_reduce_mean([sums])
    accuracy, mean_loss = (sums * world_size() / len(split)).tolist()
    return Score(accuracy, mean_loss, len(split))
