"""Batches from memory: seeded shuffling, augmentation of a whole batch at once, normalisation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dsp_pruning.data.images import ImageData, Split

__all__ = ["augment", "evaluation_batches", "normalise", "training_batches", "training_steps"]


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """(images / 255 - mean) / std.

    images: uint8 (batch, channels, height, width). Returns float32 of the same shape.
    """
    shape = (1, len(mean), 1, 1)
    mean_tensor = torch.tensor(mean, device=images.device).view(shape)
    std_tensor = torch.tensor(std, device=images.device).view(shape)
    return (images.float() / 255 - mean_tensor) / std_tensor


def augment(images: Tensor, generator: torch.Generator, *, flip: bool, crop_padding: int) -> Tensor:
    """Mirror half of the images and shift each by up to ``crop_padding`` pixels, black moving in.

    images: (batch, channels, height, width). Returns the same shape and dtype.
    generator: a CPU generator, so that a run draws the same numbers on every device.
    """
    batch, channels, height, width = images.shape
    device = images.device
    rows = torch.arange(height).expand(batch, height)
    columns = torch.arange(width).expand(batch, width)
    if flip:
        mirrored = torch.rand(batch, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    if crop_padding:
        offsets = torch.randint(0, 2 * crop_padding + 1, (2, batch, 1), generator=generator)
        rows, columns = rows + offsets[0], columns + offsets[1]
        images = torch.nn.functional.pad(images, (crop_padding,) * 4)
    of_batch = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    of_channel = torch.arange(channels, device=device).view(1, -1, 1, 1)
    return images[
        of_batch, of_channel, rows.to(device)[:, None, :, None], columns.to(device)[:, None, None, :]
    ]


def training_batches(
    data: ImageData, batch_size: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled, augmented, normalised pass over the training split.

    Yields images float32 (batch, channels, height, width) and labels int64 (batch,).
    A last batch of one image is left out: batch normalisation in training cannot use it on a 1 x 1 map.
    """
    split = data.train
    order = torch.randperm(len(split), generator=generator).to(split.labels.device)
    for chosen in order.split(batch_size):
        if len(chosen) == 1 and len(split) > 1:
            continue
        images = split.images[chosen]
        if data.flip or data.crop_padding:
            images = augment(images, generator, flip=data.flip, crop_padding=data.crop_padding)
        yield normalise(images, data.mean, data.std), split.labels[chosen]


def training_steps(data: ImageData, batch_size: int) -> int:
    """How many batches one pass of ``training_batches`` yields."""
    whole, rest = divmod(len(data.train), batch_size)
    return whole + (rest > 1 or len(data.train) == 1)


def evaluation_batches(
    data: ImageData, split: Split, batch_size: int = 512
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass in order, without augmentation; shapes and dtypes as in ``training_batches``."""
    for images, labels in zip(split.images.split(batch_size), split.labels.split(batch_size), strict=True):
        yield normalise(images, data.mean, data.std), labels
