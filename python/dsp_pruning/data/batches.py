"""Batches from memory or files: seeded shuffling, augmentation of whole batches, normalisation."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dsp_pruning.data.folder import FolderData, FolderSplit
from dsp_pruning.data.images import ImageData, Split

TrainingData = ImageData | FolderData


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """``(images / 255 - mean) / std`` per channel: uint8 (batch, channels, height, width) to float32.

    >>> normalise(torch.full((1, 1, 1, 2), 255, dtype=torch.uint8), (0.5,), (0.25,))
    tensor([[[[2., 2.]]]])
    """
    center, scale = (torch.tensor(values, device=images.device).view(1, -1, 1, 1) for values in (mean, std))
    return (images.float() / 255 - center) / scale


def augment(images: Tensor, generator: torch.Generator, *, flip: bool, crop_padding: int) -> Tensor:
    """Mirror half of the images and shift each by up to ``crop_padding`` pixels, filling with zeros.

    images: (batch, channels, height, width). Returns the same shape and dtype.
    generator: on the CPU, so that a run draws the same random numbers on every device.
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
    rows, columns = rows.to(device)[:, None, :, None], columns.to(device)[:, None, None, :]
    return images[of_batch, of_channel, rows, columns]


def training_batches(
    data: TrainingData, batch_size: int, generator: torch.Generator, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled, augmented, normalised pass over the training split.

    Yields images float32 (batch, channels, height, width) and labels int64 (batch,).
    rank, world_size: each process gets its share of the same global batches of batch_size images.
    A last batch with fewer than two images per process is skipped: batch normalisation cannot train on one
    image with a 1 x 1 feature map.
    """
    order = torch.randperm(len(data.train), generator=generator)
    chunks = order.split(batch_size)[: training_steps(data, batch_size, world_size)]
    mine = slice(rank, None, world_size)
    if isinstance(data, FolderData):
        seeds = torch.randint(2**62, (len(order),), generator=generator).split(batch_size)
        requests = [(c[mine], s[mine]) for c, s in zip(chunks, seeds, strict=False)]
        for images, labels in data.read(data.train, requests):
            yield normalise(images, data.mean, data.std), labels
        return
    split = data.train
    for chunk in chunks:
        chosen = chunk.to(split.labels.device)
        images = split.images[chosen]
        if data.flip or data.crop_padding:
            images = augment(images, generator, flip=data.flip, crop_padding=data.crop_padding)
        yield normalise(images[mine], data.mean, data.std), split.labels[chosen[mine]]


def training_steps(data: TrainingData, batch_size: int, world_size: int = 1) -> int:
    """Number of batches in one pass of ``training_batches``."""
    whole, rest = divmod(len(data.train), batch_size)
    return whole + (rest >= 2 * world_size or len(data.train) == world_size == 1)


def evaluation_batches(
    data: TrainingData, split: Split | FolderSplit, batch_size: int = 512, rank: int = 0, world_size: int = 1
) -> Iterator[tuple[Tensor, Tensor]]:
    """One pass in order, without augmentation; shapes, dtypes and ranks as in ``training_batches``."""
    positions = torch.arange(rank, len(split), world_size)
    if isinstance(data, FolderData) and isinstance(split, FolderSplit):
        for images, labels in data.read(split, [(p, None) for p in positions.split(min(batch_size, 128))]):
            yield normalise(images, data.mean, data.std), labels
    elif isinstance(split, Split):
        for chosen in positions.split(batch_size):
            index = chosen.to(split.labels.device)
            yield normalise(split.images[index], data.mean, data.std), split.labels[index]
