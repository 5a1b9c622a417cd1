"""Image data sets as tensors in memory. ``load`` finds one by the name that the command line uses."""

from __future__ import annotations

from pathlib import Path

from dsp_kernels.errors import DSPError
from dsp_pruning.data.batches import (
    TrainingData,
    augment,
    evaluation_batches,
    normalise,
    training_batches,
    training_steps,
)
from dsp_pruning.data.cifar import load_cifar10, load_cifar10_jpeg, load_cifar10_subset
from dsp_pruning.data.digits import load_digits
from dsp_pruning.data.folder import FolderData, FolderSplit, load_folder
from dsp_pruning.data.images import ImageData, Split, stratified_split

__all__ = [
    "NAMES",
    "FolderData",
    "FolderSplit",
    "ImageData",
    "Split",
    "TrainingData",
    "augment",
    "evaluation_batches",
    "load",
    "load_cifar10",
    "load_cifar10_jpeg",
    "load_cifar10_subset",
    "load_digits",
    "load_folder",
    "normalise",
    "stratified_split",
    "training_batches",
    "training_steps",
]

NAMES = ("digits", "cifar10", "subset", "jpeg", "folder")


def load(
    name: str,
    root: str | Path | None = None,
    *,
    download: bool = False,
    seed: int = 0,
    image_size: int = 224,
    workers: int = 0,
) -> TrainingData:
    """Load a data set by name.

    name: ``digits`` needs no root; ``cifar10`` takes torchvision's folder; ``subset`` and ``jpeg`` take the
    folder that holds ``cifar10_subset.npz`` / ``cifar10_jpeg.npz``, or the file itself; ``folder`` takes the
    folder of ``train`` and ``val`` (see ``load_folder``, which image_size and workers are for).
    seed: chooses the validation images (and the test images of digits).
    Raises DSPError for an unknown name or a missing root.
    """
    if name not in NAMES:
        raise DSPError(f"unknown data set {name!r}; known are {', '.join(NAMES)}")
    if name == "digits":
        return load_digits(seed)
    if root is None:
        raise DSPError(f"data set {name!r} needs --data-root: the folder where it lies")
    if name == "cifar10":
        return load_cifar10(root, download=download, seed=seed)
    if name == "folder":
        return load_folder(root, image_size=image_size, workers=workers, seed=seed)
    path = Path(root)
    if path.is_dir():
        path = path / f"cifar10_{name}.npz"
    return load_cifar10_subset(path, seed=seed) if name == "subset" else load_cifar10_jpeg(path, seed=seed)
