"""Labelled image data sets: scikit-learn's digits, CIFAR-10 and folders of image files."""

from dsp_pruning.data.batches import (
    TrainingData,
    augment,
    evaluation_batches,
    normalise,
    training_batches,
    training_steps,
)
from dsp_pruning.data.folder import FolderData, FolderSplit, load_folder
from dsp_pruning.data.images import ImageData, Split, stratified_split
from dsp_pruning.data.load import load, load_cifar10, load_digits

__all__ = [
    "FolderData",
    "FolderSplit",
    "ImageData",
    "Split",
    "TrainingData",
    "augment",
    "evaluation_batches",
    "load",
    "load_cifar10",
    "load_digits",
    "load_folder",
    "normalise",
    "stratified_split",
    "training_batches",
    "training_steps",
]
