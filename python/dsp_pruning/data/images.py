"""A labelled image data set held in memory as plain tensors, and how it is split."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsp_kernels.errors import DSPFormatError, DSPShapeError

__all__ = ["ImageData", "Split", "stratified_split"]


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    images: uint8 (n, channels, height, width), 0..255; labels: int64 (n,), on the same device.
    Raises DSPShapeError where the two do not fit each other.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8:
            raise DSPShapeError(
                f"images must be uint8 (n, channels, height, width), got {self.images.dtype} "
                f"of shape {tuple(self.images.shape)}"
            )
        if self.labels.shape != self.images.shape[:1] or self.labels.dtype != torch.int64:
            raise DSPShapeError(
                f"labels must be int64 ({len(self.images)},), one for each image, got {self.labels.dtype} "
                f"of shape {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Split:
        """The images at these positions, in this order. index: int64 (m,)."""
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> Split:
        """The same split on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A data set in three splits: train teaches, validation chooses the checkpoint, test is read once.

    mean, std: one value per channel, on the 0..1 scale.
    flip, crop_padding: the augmentation that this kind of image allows in training.
    Raises DSPFormatError where a split holds other sizes or labels than the data set says.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    flip: bool = False
    crop_padding: int = 0

    def __post_init__(self) -> None:
        for name in ("train", "validation", "test"):
            split: Split = getattr(self, name)
            if not len(split):
                raise DSPFormatError(f"data set {self.name!r}: the {name} split is empty")
            if split.images.shape[1:] != self.train.images.shape[1:]:
                raise DSPFormatError(
                    f"data set {self.name!r}: {name} images are {tuple(split.images.shape[1:])}, "
                    f"training images {tuple(self.train.images.shape[1:])}"
                )
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= self.num_classes:
                raise DSPFormatError(
                    f"data set {self.name!r}: {name} labels run from {low} to {high}, "
                    f"they must lie in 0..{self.num_classes - 1}"
                )
        if not len(self.mean) == len(self.std) == self.channels:
            raise DSPFormatError(
                f"data set {self.name!r}: {self.channels} channels need as many means and stds"
            )

    @property
    def channels(self) -> int:
        """Channels of one image."""
        return int(self.train.images.shape[1])

    @property
    def image_hw(self) -> tuple[int, int]:
        """Height and width of one image."""
        return int(self.train.images.shape[2]), int(self.train.images.shape[3])

    def to(self, device: torch.device | str) -> ImageData:
        """The same data set on another device."""
        return ImageData(
            self.name,
            self.train.to(device),
            self.validation.to(device),
            self.test.to(device),
            self.mean,
            self.std,
            self.num_classes,
            self.flip,
            self.crop_padding,
        )

    def example(self) -> Tensor:
        """One normalised image of zeros: float32 (1, channels, height, width), for tracing and sizes."""
        return torch.zeros(1, self.channels, *self.image_hw)


def stratified_split(labels: Tensor, held_out: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of two splits that both hold every class in the same proportion.

    labels: int64 (n,). held_out: share of each class, rounded up, that goes to the second split.
    Returns int64 positions (rest, held out), each sorted.
    Raises DSPFormatError where a class is too small to stand in both.
    """
    rest: list[Tensor] = []
    chosen: list[Tensor] = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        count = -int(-held_out * len(members) // 1)
        if not 0 < count < len(members):
            raise DSPFormatError(
                f"class {label} has {len(members)} images: too few to hold out {held_out:.0%} of them"
            )
        order = members[torch.randperm(len(members), generator=generator)]
        chosen.append(order[:count])
        rest.append(order[count:])
    return torch.cat(rest).sort().values, torch.cat(chosen).sort().values
