"""Flags that several commands share. The published ones keep their names."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

import typer

from dsp_cli.show import StepProgress, progress_bars
from dsp_kernels.errors import DSPFormatError, DSPPruningError
from dsp_pruning import data as datasets
from dsp_pruning.distributed import is_main, process_group
from dsp_pruning.models.imagenet import published_weights
from dsp_pruning.recipes.checkpoint import load_weights
from dsp_pruning.recipes.run import MODEL, RunConfig

__all__ = [
    "Checkpoint",
    "DataName",
    "Device",
    "Groups",
    "LayerGroups",
    "Layers",
    "Rounds",
    "RunFlags",
    "Seed",
    "check_packed_name",
    "groups_folder",
    "layer_groups",
    "run_command",
    "stage_weights",
    "training",
]


class DataName(StrEnum):
    """Data sets by name, see ``dsp_pruning.data``."""

    digits = "digits"
    cifar10 = "cifar10"
    subset = "subset"
    jpeg = "jpeg"
    folder = "folder"


class Arch(StrEnum):
    """Networks by name, see ``dsp_pruning.models``."""

    cifar = "cifar"
    resnet18 = "resnet18"
    resnet34 = "resnet34"
    resnet50 = "resnet50"
    resnet101 = "resnet101"
    resnet152 = "resnet152"


class Precision(StrEnum):
    """See ``dsp_pruning.recipes.precision``."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


Config = TypeVar("Config", bound=RunConfig)
_LONGEST_LAYERS = 150  # of 255 characters that file systems allow in a name

Layers = Annotated[
    int, typer.Option("--layers", "-l", help="Depth of the CIFAR ResNet, 6n + 2: 20, 32, 44, 56, 110.")
]
Groups = Annotated[int, typer.Option("--groups", "-g", min=1, help="Groups of every layer.")]
LayerGroups = Annotated[
    list[str] | None,
    typer.Option(
        "--layer-groups",
        metavar="PATTERN=G",
        help="Other groups for layers whose name fits, such as 'stage_3.*=8'; may be given again.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of weights, splits, batch order and noise.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ..., or auto.")]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--ckpt",
        help="Weights to start from; `torchvision` takes its own. Default: the previous stage in --save-dir.",
    ),
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Samples per network.")]


_OTHERS = (".pt", ".pth", ".pt2", ".onnx", ".npz")


def check_packed_name(path: Path) -> None:
    """Raise DSPFormatError for the name of another format."""
    if path.suffix in _OTHERS:
        raise DSPFormatError(f"{path} would hold safetensors: name it so; dsp export writes other formats")


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """The flags of every training command; ``run_command`` puts them on one. None: the recipe's default."""

    layers: Layers = RunConfig.depth
    arch: Annotated[
        Arch, typer.Option("--arch", help="cifar, or a ResNet of torchvision (--layers then has no use).")
    ] = Arch.cifar
    data: Annotated[
        DataName, typer.Option("--data", help="Which images; folder: train/<class>/* and val/<class>/*.")
    ] = DataName.digits
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="Folder (or .npz file) with the images.")
    ] = None
    download: Annotated[bool, typer.Option("--download", help="Let torchvision fetch CIFAR-10.")] = False
    image_size: Annotated[
        int, typer.Option("--image-size", min=1, help="Height and width of images from --data folder.")
    ] = 224
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Processes that read image files, 0 for none.")
    ] = 0
    save_dir: Annotated[
        Path | None,
        typer.Option("--save-dir", help="Folder of all stages. Default: runs/resnet<layers>_<data>."),
    ] = None
    epochs: Annotated[
        int | None, typer.Option("--epochs", min=0, help="Passes over the training images.")
    ] = None
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images per step, of all processes together.")
    ] = RunConfig.batch_size
    lr: Annotated[float | None, typer.Option("--lr", help="Base learning rate.")] = None
    momentum: Annotated[float, typer.Option("--momentum", help="Momentum of SGD.")] = RunConfig.momentum
    wd: Annotated[float | None, typer.Option("--wd", help="Weight decay of SGD.")] = None
    precision: Annotated[Precision, typer.Option("--precision", help="Of forward and backward passes.")] = (
        Precision.float32
    )
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Hold weights in that order of memory.")
    ] = False
    seed: Seed = 0
    device: Device = "auto"
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint of this run, same settings.")
    ] = False

    def config(self, kind: type[Config], **more: Any) -> Config:
        """The settings of a recipe: these flags and ``more``."""
        given: dict[str, Any] = {"epochs": self.epochs, "lr": self.lr, "weight_decay": self.wd}
        return kind(
            arch=self.arch.value,
            depth=self.layers,
            batch_size=self.batch_size,
            momentum=self.momentum,
            seed=self.seed,
            device=self.device,
            precision=self.precision.value,
            channels_last=self.channels_last,
            **{name: value for name, value in given.items() if value is not None},
            **more,
        )

    def images(self) -> datasets.TrainingData:
        """The data set."""
        return datasets.load(
            self.data.value,
            self.data_root,
            download=self.download,
            seed=self.seed,
            image_size=self.image_size,
            workers=self.workers,
        )

    @property
    def network(self) -> str:
        """How to ask for the same network on the command line."""
        return f"-l {self.layers}" if self.arch == "cifar" else f"--arch {self.arch.value}"

    @property
    def folder(self) -> Path:
        """The folder of all stages of one network."""
        if self.save_dir is not None:
            return self.save_dir
        name = f"resnet{self.layers}" if self.arch == "cifar" else self.arch.value
        return Path("runs") / f"{name}_{self.data.value}"


def run_command(defaults: type[RunConfig]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, whose first argument is a RunFlags, these flags beside its own.

    defaults: the recipe whose epochs, learning rate and weight decay ``--help`` shows.
    """
    flag_of = {"epochs": "epochs", "lr": "lr", "weight_decay": "wd"}
    fields = {field.name: field.default for field in dataclasses.fields(defaults)}
    shown = {flag: fields[name] for name, flag in flag_of.items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]
        common = [
            parameter.replace(
                kind=inspect.Parameter.KEYWORD_ONLY, default=shown.get(parameter.name, parameter.default)
            )
            for parameter in inspect.signature(RunFlags, eval_str=True).parameters.values()
        ]
        names = [parameter.name for parameter in common]

        @functools.wraps(command)
        def with_flags(**given: Any) -> None:
            flags = RunFlags(**{name: given.pop(name) for name in names})
            command(flags, **given)

        signature = inspect.Signature([*own, *common])
        with_flags.__signature__ = signature  # type: ignore[attr-defined]
        with_flags.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return with_flags

    return decorate


def layer_groups(given: Sequence[str] | None) -> dict[str, int]:
    """Pattern -> G of every ``--layer-groups``. Raises DSPPruningError for one that is not PATTERN=G."""
    found = {}
    for text in given or ():
        pattern, _, count = text.rpartition("=")
        if not pattern or not count.isdecimal():
            raise DSPPruningError(f"--layer-groups is {text!r}; expected PATTERN=G such as 'stage_3.*=8'")
        found[pattern] = int(count)
    return found


def groups_folder(groups: int, by_layer: Mapping[str, int]) -> str:
    """How the folder of a stage names these groups: ``g4``, ``g4_stage_3.%2A=8``; other groups, other names.

    Patterns are quoted as in a URL, so that "=" only stands in front of a number; too many for the name of a
    file are named by their digest.
    """
    layers = "".join(f"_{quote(pattern, safe='')}={count}" for pattern, count in by_layer.items())
    if len(layers) > _LONGEST_LAYERS:
        layers = f"_{hashlib.sha256(layers.encode()).hexdigest()[:32]}"
    return f"g{groups}{layers}"


@contextmanager
def training(stage: str) -> Iterator[StepProgress | None]:
    """Join torchrun's processes, if any; gives the progress callback of a stage, to process 0 only."""
    with process_group():
        if not is_main():
            yield None
            return
        with progress_bars() as bars:
            yield bars(stage)


def stage_weights(
    flags: RunFlags, ckpt: Path | None, stage: str, command: str
) -> tuple[dict[str, Any], str | Path]:
    """The weights to start from and where they are from: ``--ckpt``, or what the stage before left.

    Raises DSPPruningError, naming that stage's command, where it left nothing.
    """
    if str(ckpt) == "torchvision":
        return published_weights(flags.arch.value), f"torchvision's weights of {flags.arch.value}"
    path = ckpt or flags.folder / stage / MODEL
    if ckpt is None and not path.is_file():
        unfinished = path.with_name("checkpoint.pt")
        also = f" (unfinished so far: --ckpt {unfinished} would take it)" if unfinished.is_file() else ""
        raise DSPPruningError(f"no {path}: run `dsp {command}` first, or pass --ckpt{also}")
    return load_weights(path)[0], path
