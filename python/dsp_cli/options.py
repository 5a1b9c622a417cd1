"""Options that several commands share, under their published names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from dsp_cli.show import print_result, progress_bars
from dsp_kernels.errors import DSPFormatError
from dsp_pruning import data as datasets
from dsp_pruning.distributed import is_main, process_group
from dsp_pruning.recipes.run import RunConfig
from dsp_pruning.recipes.training import RecipeResult

DataName = StrEnum("DataName", "digits cifar10 folder")
Arch = StrEnum("Arch", "cifar resnet18 resnet34 resnet50 resnet101 resnet152")
Precision = StrEnum("Precision", "float32 bfloat16 float16")

Config = TypeVar("Config", bound=RunConfig)

Layers = Annotated[
    int, typer.Option("--layers", "-l", help="Depth of the CIFAR ResNet, 6n + 2: 20, 32, 44, 56, 110.")
]
Groups = Annotated[int, typer.Option("--groups", "-g", min=1, help="Groups per layer.")]
Seed = Annotated[int, typer.Option("--seed", help="Of initial weights, splits, shuffling and noise.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ..., or auto.")]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", min=1, help="Image size in pixels. Default: the size in the file."),
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Timing samples per network.")]


def check_packed_name(path: Path) -> None:
    """Raise DSPFormatError for a path with the suffix of another format."""
    if path.suffix in (".pt", ".pth", ".pt2", ".onnx", ".npz"):
        raise DSPFormatError(
            f"{path} would contain safetensors: use .safetensors, or dsp export for another format"
        )


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Options of every training command, see ``run_command``. None: the default of the recipe."""

    layers: Layers = RunConfig.depth
    arch: Annotated[
        Arch, typer.Option("--arch", help="cifar, or a torchvision ResNet (which ignores --layers).")
    ] = Arch.cifar
    data: Annotated[
        DataName,
        typer.Option("--data", help="Data set. folder: image files in train/<class>/ and val/<class>/."),
    ] = DataName.digits
    data_root: Annotated[
        Path | None, typer.Option("--data-root", help="Folder of the data set; digits needs none.")
    ] = None
    download: Annotated[bool, typer.Option("--download", help="Download CIFAR-10 if it is missing.")] = False
    image_size: Annotated[
        int, typer.Option("--image-size", min=1, help="Crop size in pixels, for --data folder.")
    ] = 224
    workers: Annotated[
        int, typer.Option("--workers", min=0, help="Processes that decode image files, 0 for none.")
    ] = 0
    save_dir: Annotated[
        Path | None,
        typer.Option("--save-dir", help="Folder of all stages. Default: runs/resnet<layers>_<data>."),
    ] = None
    epochs: Annotated[int | None, typer.Option("--epochs", min=0, help="Epochs to train.")] = None
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images per step, summed over all processes.")
    ] = RunConfig.batch_size
    lr: Annotated[float | None, typer.Option("--lr", help="Base learning rate.")] = None
    momentum: Annotated[float, typer.Option("--momentum", help="Momentum of SGD.")] = RunConfig.momentum
    wd: Annotated[float | None, typer.Option("--wd", help="Weight decay of SGD.")] = None
    precision: Annotated[Precision, typer.Option("--precision", help="Of forward and backward passes.")] = (
        Precision.float32
    )
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Memory format of the weights; faster on a CPU.")
    ] = False
    seed: Seed = 0
    device: Device = "auto"
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint, with the same settings.")
    ] = False

    def config(self, kind: type[Config], **more: Any) -> Config:
        """Settings of a recipe from these options and ``more``."""
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
        """Options that select the same network."""
        return f"-l {self.layers}" if self.arch == Arch.cifar else f"--arch {self.arch.value}"

    @property
    def folder(self) -> Path:
        """Folder of all stages of a network."""
        if self.save_dir is not None:
            return self.save_dir
        name = f"resnet{self.layers}" if self.arch == Arch.cifar else self.arch.value
        return Path("runs") / f"{name}_{self.data.value}"

    def train(self, stage: str, folder: str, recipe: Callable[..., RecipeResult]) -> None:
        """Run a recipe, in torchrun's process group if there is one; rank 0 shows progress and the result.

        recipe: takes (images, directory=, resume=, progress=). folder: of the stage.
        """
        with process_group():
            run = functools.partial(recipe, self.images(), directory=self.folder / folder, resume=self.resume)
            if not is_main():
                run()
                return
            with progress_bars() as bars:
                result = run(progress=bars(stage))
            print_result(result)


def run_command(defaults: type[RunConfig]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of RunFlags to a command whose first parameter is a RunFlags.

    defaults: the recipe whose epochs, learning rate and weight decay ``--help`` shows.
    """
    fields = {"epochs": "epochs", "lr": "lr", "wd": "weight_decay"}
    shown = {flag: getattr(defaults, name) for flag, name in fields.items()}

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
