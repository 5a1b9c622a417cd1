"""Flags that several commands share. The published ones keep their names."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from dsp_kernels.errors import DSPPruningError
from dsp_pruning.recipes.run import MODEL

__all__ = [
    "BatchSize",
    "Checkpoint",
    "Data",
    "DataName",
    "DataRoot",
    "Device",
    "Download",
    "Epochs",
    "Groups",
    "ImageSize",
    "Layers",
    "LearningRate",
    "Momentum",
    "Resume",
    "Rounds",
    "SaveDir",
    "Seed",
    "WeightDecay",
    "run_folder",
    "stage_weights",
]


class DataName(StrEnum):
    """Data sets by name, see ``dsp_pruning.data``."""

    digits = "digits"
    cifar10 = "cifar10"
    subset = "subset"
    jpeg = "jpeg"


Layers = Annotated[
    int, typer.Option("--layers", "-l", help="Depth of the CIFAR ResNet, 6n + 2: 20, 32, 44, 56, 110.")
]
Groups = Annotated[int, typer.Option("--groups", "-g", min=1, help="Groups of every layer.")]
Epochs = Annotated[int, typer.Option("--epochs", min=0, help="Passes over the training images.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images per step.")]
LearningRate = Annotated[float, typer.Option("--lr", help="Base learning rate.")]
Momentum = Annotated[float, typer.Option("--momentum", help="Momentum of SGD.")]
WeightDecay = Annotated[float, typer.Option("--wd", help="Weight decay of SGD.")]
Seed = Annotated[int, typer.Option("--seed", help="Of weights, splits, batch order and noise.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ..., or auto.")]
Data = Annotated[DataName, typer.Option("--data", help="Which images.")]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Folder (or .npz file) with the images.")]
Download = Annotated[bool, typer.Option("--download", help="Let torchvision fetch CIFAR-10.")]
SaveDir = Annotated[
    Path | None, typer.Option("--save-dir", help="Folder of all stages. Default: runs/resnet<layers>_<data>.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option("--ckpt", help="Weights to start from. Default: the previous stage in --save-dir."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from the last checkpoint of this run, with the same settings.")
]
ImageSize = Annotated[int, typer.Option("--image-size", min=1, help="Height and width of an input image.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Samples per network.")]


def stage_weights(ckpt: Path | None, folder: Path, command: str) -> Path:
    """The file to start from: ``--ckpt``, or what the stage before left in its folder.

    Raises DSPPruningError, naming that stage's command, where it left nothing.
    """
    if ckpt is not None:
        return ckpt
    if not (folder / MODEL).is_file():
        unfinished = folder / "checkpoint.pt"
        also = f" (unfinished so far: --ckpt {unfinished} would take it)" if unfinished.is_file() else ""
        raise DSPPruningError(f"no {folder / MODEL}: run `dsp {command}` first, or pass --ckpt{also}")
    return folder / MODEL


def run_folder(save_dir: Path | None, layers: int, data: DataName) -> Path:
    """The folder of all stages of one network."""
    return save_dir if save_dir is not None else Path("runs") / f"resnet{layers}_{data.value}"
