"""Image files in one folder per class (the layout of ImageNet), read and augmented batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_pruning.data.images import stratified_split

# Of ImageNet's training images, scaled to 0..1; torchvision's weights expect them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

_VALIDATION_SHARE = 0.04  # of the training images: about 50,000 of ImageNet, as many as its test split
_RESIZE = 256 / 224  # short side over central crop, as torchvision evaluates its weights
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop (Szegedy et al. 2015)
_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")

# Positions in a split and, for random crops, one seed per position.
Request = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class FolderSplit:
    """Image files and their labels, int64 (n,)."""

    paths: tuple[Path, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class FolderData:
    """A data set on disk. Training images are cropped randomly and mirrored, others get a central crop.

    image_size: height and width of the crops in pixels. workers: decoding processes, 0 for none.
    device: of the batches.
    """

    name: str
    train: FolderSplit
    validation: FolderSplit
    test: FolderSplit
    classes: tuple[str, ...]
    image_size: int = 224
    workers: int = 0
    device: str = "cpu"
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    channels = 3  # red, green, blue

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def image_hw(self) -> tuple[int, int]:
        return self.image_size, self.image_size

    def to(self, device: torch.device | str) -> FolderData:
        """The same files, with batches on another device."""
        return replace(self, device=str(device))

    def example(self) -> Tensor:
        """A batch of one, all zeros, for tracing: float32 (1, 3, height, width)."""
        return torch.zeros(1, self.channels, *self.image_hw)

    def read(self, split: FolderSplit, requests: Sequence[Request]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields images uint8 (batch, 3, height, width) and labels int64 (batch,), one batch per request.

        The crops depend on the seeds only, not on the number of workers.
        Raises DSPFormatError for a file that is not an image.
        """
        batches = [
            [(int(p), None if seeds is None else int(seeds[i])) for i, p in enumerate(positions)]
            for positions, seeds in requests
        ]
        files, unused = _Files(split, self.image_size), torch.Generator()  # DataLoader draws a seed from it
        loader: Any = DataLoader(files, batch_sampler=batches, num_workers=self.workers, generator=unused)
        for images, labels in loader:
            if labels.min() < 0:  # an exception from a worker would lose its type
                path = split.paths[-1 - int(labels.min())]
                raise DSPFormatError(f"{path} is not a readable image")
            yield images.to(self.device), labels.to(self.device)


def load_folder(root: str | Path, *, image_size: int = 224, workers: int = 0, seed: int = 0) -> FolderData:
    """JPEG, PNG, BMP and WebP files in ``root/train/<class>/`` and ``root/val/<class>/``.

    ``val`` is the test split, because published accuracies are measured on it. The validation split is 4 % of
    each class of ``train``, selected by seed.
    image_size: height and width of the crops in pixels. workers: decoding processes, 0 for none.
    Raises DSPFormatError if a folder is missing or empty, or a class of ``val`` is not in ``train``; DSPError
    if pillow is not installed.

    >>> data = load_folder("imagenet", image_size=224, workers=8)  # doctest: +SKIP
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DSPError("reading image files needs pillow: pip install 'dsp-kernels[vision]'") from error
    root = Path(root)
    classes = tuple(sorted(path.name for path in _folders(root / "train")))
    other = {path.name for path in _folders(root / "val")} - set(classes)
    if other:
        raise DSPFormatError(
            f"{root / 'val'} has classes that are not in train: {', '.join(sorted(other)[:3])}"
        )
    everything, test = (_split(root / part, classes) for part in ("train", "val"))
    rest, held = stratified_split(everything.labels, _VALIDATION_SHARE, torch.Generator().manual_seed(seed))
    train, validation = (
        FolderSplit(tuple(everything.paths[i] for i in chosen.tolist()), everything.labels[chosen])
        for chosen in (rest, held)
    )
    return FolderData(f"folder:{root.name}", train, validation, test, classes, image_size, workers)


@dataclass
class _Files(Dataset[tuple[Tensor, int]]):
    split: FolderSplit
    size: int

    def __getitem__(self, item: Any) -> tuple[Tensor, int]:
        position, seed = item
        try:
            image = _read_image(self.split.paths[position], self.size, seed)
        except (OSError, SyntaxError, ValueError):  # what pillow raises for a damaged file
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), -1 - position
        return image, int(self.split.labels[position])


def _read_image(path: Path, size: int, seed: int | None) -> Tensor:
    """uint8 (3, size, size): a random crop, maybe mirrored; the central crop if seed is None."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as file:
        image = file.convert("RGB")
    width, height = image.size
    if seed is None:
        side = min(width, height) / _RESIZE
        box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        mirrored = False
    else:
        box, mirrored = _random_box(width, height, torch.Generator().manual_seed(seed))
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return (pixels.flip(2) if mirrored else pixels).contiguous()


def _random_box(
    width: int, height: int, generator: torch.Generator
) -> tuple[tuple[float, float, float, float], bool]:
    """A crop (left, top, right, bottom) of random area and aspect ratio, and whether to mirror it."""
    area, aspect, x, y, mirror = torch.rand(5, generator=generator, dtype=torch.float64).tolist()
    pixels = width * height * (_AREA[0] + area * (_AREA[1] - _AREA[0]))
    ratio = _ASPECT[0] * (_ASPECT[1] / _ASPECT[0]) ** aspect
    wide, high = min(width, (pixels * ratio) ** 0.5), min(height, (pixels / ratio) ** 0.5)
    left, top = x * (width - wide), y * (height - high)
    return (left, top, left + wide, top + high), mirror < 0.5


def _folders(root: Path) -> list[Path]:
    found = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    if not found:
        raise DSPFormatError(f"{root} must be a folder with one folder of images per class")
    return found


def _split(root: Path, classes: tuple[str, ...]) -> FolderSplit:
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        folder = root / name
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        own = [path for path in files if path.suffix.lower() in _ENDINGS]
        paths += own
        labels += [label] * len(own)
    if not paths:
        raise DSPFormatError(f"{root} contains no image files")
    return FolderSplit(tuple(paths), torch.tensor(labels, dtype=torch.int64))
