"""CIFAR-10 in its three forms: torchvision's, the lossless subset, and all of it as JPEG files."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_pruning.data.images import ImageData, Split, stratified_split

__all__ = ["load_cifar10", "load_cifar10_jpeg", "load_cifar10_subset"]

# Of the training images, on the 0..1 scale (golden README, section 1).
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)

VALIDATION_SHARE = 0.1  # of the training images

_IMAGE_SHAPE = (3, 32, 32)

Progress = Callable[[int, int], None]


def load_cifar10(root: str | Path, *, download: bool = False, seed: int = 0) -> ImageData:
    """The original 50,000 + 10,000 images through torchvision.

    root: where torchvision keeps or finds ``cifar-10-batches-py``. seed chooses the validation images.
    Raises DSPError where torchvision is missing or the files are not there and ``download`` is off.
    """
    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise DSPError(f"CIFAR-10 needs torchvision: pip install 'dsp-kernels[vision]' ({error})") from error
    try:
        parts = [CIFAR10(str(root), train=train, download=download) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise DSPError(f"no CIFAR-10 in {root}: {error}. --download fetches it") from error
    train, test = (
        Split(
            torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(),
            torch.tensor(part.targets, dtype=torch.int64),
        )
        for part in parts
    )
    return _with_validation("cifar10", train, test, seed)


def load_cifar10_subset(path: str | Path, *, seed: int = 0) -> ImageData:
    """The first 5,085 training and 1,017 test images of the original, from ``cifar10_subset.npz``.

    Raises DSPFormatError for a file that is missing, truncated or foreign.
    """
    arrays = _read_arrays(path, ("train_images", "train_labels", "test_images", "test_labels"))
    train, test = (
        Split(_tensor(arrays[f"{part}_images"], torch.uint8), _tensor(arrays[f"{part}_labels"], torch.int64))
        for part in ("train", "test")
    )
    return _with_validation("cifar10-subset", train, test, seed)


def load_cifar10_jpeg(path: str | Path, *, seed: int = 0, progress: Progress | None = None) -> ImageData:
    """All of CIFAR-10 from ``cifar10_jpeg.npz``, decoded once (about 5 s on one core).

    JPEG has changed the pixels: accuracies from here do not compare with published ones.
    progress: called with (decoded, total) from time to time.
    Raises DSPFormatError for a file that is missing, truncated or foreign.
    """
    names = [f"{part}_{what}" for part in ("train", "test") for what in ("bytes", "offsets", "labels")]
    arrays = _read_arrays(path, names)
    total = sum(len(arrays[f"{part}_labels"]) for part in ("train", "test"))
    done = 0
    splits = []
    for part in ("train", "test"):
        files, offsets = arrays[f"{part}_bytes"], arrays[f"{part}_offsets"]
        labels = _tensor(arrays[f"{part}_labels"], torch.int64)
        if len(offsets) != len(labels) + 1:
            raise DSPFormatError(f"{path}: {len(labels)} {part} labels but {len(offsets) - 1} images")
        images = np.empty((len(labels), *_IMAGE_SHAPE), dtype=np.uint8)
        for i in range(len(labels)):
            images[i] = _decode(files[offsets[i] : offsets[i + 1]].tobytes(), f"{path}: {part} image {i}")
            done += 1
            if progress is not None and (done % 1000 == 0 or done == total):
                progress(done, total)
        splits.append(Split(torch.from_numpy(images), labels))
    return _with_validation("cifar10-jpeg", splits[0], splits[1], seed)


def _with_validation(name: str, train: Split, test: Split, seed: int) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    rest, validation = stratified_split(train.labels, VALIDATION_SHARE, generator)
    return ImageData(
        name=name,
        train=train[rest],
        validation=train[validation],
        test=test,
        mean=MEAN,
        std=STD,
        num_classes=10,
        flip=True,
        crop_padding=4,
    )


def _decode(file: bytes, where: str) -> np.ndarray[Any, Any]:
    try:
        from PIL import Image
    except ImportError as error:
        raise DSPError("decoding JPEG needs pillow: pip install 'dsp-kernels[vision]'") from error
    try:
        image = np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).transpose(2, 0, 1)
    except OSError as error:
        raise DSPFormatError(f"{where} is not a readable JPEG: {error}") from error
    if image.shape != _IMAGE_SHAPE:
        raise DSPFormatError(f"{where} has shape {image.shape}, it must be {_IMAGE_SHAPE}")
    return image


def _read_arrays(path: str | Path, names: list[str] | tuple[str, ...]) -> dict[str, np.ndarray[Any, Any]]:
    if not Path(path).is_file():
        raise DSPFormatError(f"{path}: no such file")
    try:
        with np.load(path) as archive:
            missing = [name for name in names if name not in archive.files]
            if missing:
                raise DSPFormatError(f"{path} lacks the arrays {', '.join(missing)}")
            return {name: archive[name] for name in names}
    except DSPFormatError:
        raise
    except Exception as error:  # numpy raises zipfile, zlib, pickle and value errors for a bad archive
        raise DSPFormatError(f"{path} is not a readable .npz file: {error}") from error


def _tensor(array: np.ndarray[Any, Any], dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
