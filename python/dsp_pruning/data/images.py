"""A labelled image data set in memory, and stratified splits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsp_kernels.errors import DSPFormatError, DSPShapeError


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    images: uint8 (n, channels, height, width), 0..255. labels: int64 (n,), on the same device.
    Raises DSPShapeError if a shape or dtype differs from these.
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
                f"labels must be int64 ({len(self.images)},), one per image, got {self.labels.dtype} "
                f"of shape {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> Split:
        """The images at these positions, in this order. index: int64 (m,)."""
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device | str) -> Split:
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A data set in memory: train fits the weights, validation selects the epoch, test is scored once.

    mean, std: per channel, of images scaled to 0..1.
    flip, crop_padding: the augmentation in training; crop_padding is the largest shift in pixels.
    Raises DSPFormatError for an empty split, or image sizes or labels that contradict each other.
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
                    f"data set {self.name!r}: {name} labels range from {low} to {high}, "
                    f"expected 0..{self.num_classes - 1}"
                )
        if not len(self.mean) == len(self.std) == self.channels:
            raise DSPFormatError(f"data set {self.name!r}: mean and std need {self.channels} values each")

    @property
    def channels(self) -> int:
        return int(self.train.images.shape[1])

    @property
    def image_hw(self) -> tuple[int, int]:
        return int(self.train.images.shape[2]), int(self.train.images.shape[3])

    def to(self, device: torch.device | str) -> ImageData:
        splits = {name: getattr(self, name).to(device) for name in ("train", "validation", "test")}
        return replace(self, **splits)

    def example(self) -> Tensor:
        """A batch of one, all zeros, for tracing: float32 (1, channels, height, width)."""
        return torch.zeros(1, self.channels, *self.image_hw)


def stratified_split(labels: Tensor, held_out: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Positions of two splits that contain every class in the same proportion.

    labels: int64 (n,). held_out: share of each class, rounded up, in the second split.
    Returns int64 positions (rest, held out), each sorted.
    Raises DSPFormatError if a class is too small to be in both.
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
