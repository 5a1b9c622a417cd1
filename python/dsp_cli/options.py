"""Options that several commands share, under their published names."""

import ast
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar, get_type_hints

import typer

from dsp_cli.show import print_result, progress_bars
from dsp_kernels.errors import DSPError, DSPPruningError
from dsp_pruning import data as datasets
from dsp_pruning.distributed import is_main, process_group
from dsp_pruning.recipes.run import RunConfig
from dsp_pruning.recipes.training import RecipeResult

Config = TypeVar("Config", bound=RunConfig)

_MODEL = (
    "Your own network instead: a function that returns it, or timm/NAME. The current folder is searched too."
)
_MODEL_ARGS = "Argument of that function, such as num_classes=10; repeatable."

# The settings of the recipes that are options, by name of the field, which has the type and the default.
SETTINGS: dict[str, Any] = {
    "groups": typer.Option("--groups", "-g", min=1, help="Groups per layer."),
    "layer_groups": typer.Option(
        "--layer-groups",
        metavar="PATTERN=G",
        help="Another number of groups for layers whose name matches, such as 'stage_3.*=8'; repeatable.",
    ),
    "regularize": typer.Option(
        "--regularize", "-r", help="Strength of the regulariser (lambda of the paper)."
    ),
    "temperature": typer.Option("--temperature", help="Of the Gumbel softmax."),
    "second_order": typer.Option("--second-order", help="Second-order term of the gradient of the logits."),
    "init": typer.Option("--init", help="First groups: random, or by the weights for a rate of --prune."),
    "prune": typer.Option("--prune", "-p", help="Share of the grouped layers' cost to remove, 0..1."),
    "target": typer.Option("--target", help="That cost: multiply-adds, parameters, or time (dsp calibrate)."),
    "batch": typer.Option("--batch", min=1, help="Images of the calls whose time --target time counts."),
    "channel_multiple": typer.Option(
        "--channel-multiple", min=1, help="Keep a multiple of this many channels per group."
    ),
    "fp_every_nth_conv": typer.Option(
        "--fp-every-nth-conv", help="Also prune filters of every nth layer: 2, bottlenecks 3, none -1."
    ),
    "cycles": typer.Option("--cycles", min=1, help="Cosine cycles; each starts by pruning a little more."),
    "one_shot": typer.Option("--one-shot", help="Prune all in the first cycle."),
    "depth": typer.Option("--layers", "-l", help="Depth of the CIFAR ResNet, 6n + 2: 20, 32, 44, 56, 110."),
    "arch": typer.Option("--arch", help="cifar, or a torchvision ResNet (which ignores --layers)."),
    "model": typer.Option("--model", metavar="PACKAGE.MODULE:FUNCTION", help=_MODEL),
    "model_args": typer.Option("--model-args", metavar="NAME=VALUE", help=_MODEL_ARGS),
    "epochs": typer.Option("--epochs", min=0, help="Epochs to train."),
    "batch_size": typer.Option("--batch-size", min=1, help="Images per step, summed over all processes."),
    "lr": typer.Option("--lr", help="Base learning rate."),
    "momentum": typer.Option("--momentum", help="Momentum of SGD."),
    "weight_decay": typer.Option("--wd", help="Weight decay of SGD."),
    "precision": typer.Option("--precision", help="Of forward and backward passes."),
    "channels_last": typer.Option("--channels-last", help="Memory format of the weights; faster on a CPU."),
    "seed": typer.Option("--seed", help="Of initial weights, splits, shuffling and noise."),
    "device": typer.Option("--device", help="cpu, cuda, cuda:1, ..., or auto."),
}
# Types for typer where the field has another one.
_TYPES = {
    "arch": StrEnum("Arch", "cifar resnet18 resnet34 resnet50 resnet101 resnet152"),
    "precision": StrEnum("Precision", "float32 bfloat16 float16"),
    "init": StrEnum("Init", "random weights"),
    "second_order": StrEnum("SecondOrder", "exact none original"),
    "target": StrEnum("Target", "macs params time"),
    "layer_groups": list[str] | None,
    "model_args": list[str] | None,
}

Model = Annotated[str, SETTINGS["model"]]
ModelArgs = Annotated[list[str] | None, SETTINGS["model_args"]]
Layers = Annotated[int, SETTINGS["depth"]]
Groups = Annotated[int, SETTINGS["groups"]]
Prune = Annotated[float, SETTINGS["prune"]]
Seed = Annotated[int, SETTINGS["seed"]]
Device = Annotated[str, SETTINGS["device"]]
File = Annotated[Path, typer.Argument(help="A packed network (.safetensors).")]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", min=1, help="Image size in pixels. Default: the size trained on."),
]
Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="digits, cifar10, folder (image files in train/<class>/ and val/<class>/), or your own: "
        "package.module:function, which returns dsp_pruning.data.ImageData or FolderData.",
    ),
]
DataRoot = Annotated[
    Path | None, typer.Option("--data-root", help="Folder of the data set; digits needs none.")
]
Download = Annotated[bool, typer.Option("--download", help="Download CIFAR-10 if it is missing.")]
CropSize = Annotated[int, typer.Option("--image-size", min=1, help="Crop size in pixels, for --data folder.")]
Workers = Annotated[
    int, typer.Option("--workers", min=0, help="Processes that decode image files, 0 for none.")
]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Timing samples per network.")]


@dataclass(frozen=True, kw_only=True)
class RunFlags(Generic[Config]):
    """Options of every training command, see ``run_command``: the settings of its recipe, and the others."""

    config: Config
    data: Data = "digits"
    data_root: DataRoot = None
    download: Download = False
    image_size: CropSize = 224
    workers: Workers = 0
    save_dir: Annotated[
        Path | None,
        typer.Option("--save-dir", help="Folder of all stages. Default: runs/resnet<layers>_<data>."),
    ] = None
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint, with the same settings.")
    ] = False

    def images(self) -> datasets.TrainingData:
        return datasets.load(
            self.data,
            self.data_root,
            download=self.download,
            seed=self.config.seed,
            image_size=self.image_size,
            workers=self.workers,
        )

    @property
    def network(self) -> str:
        """Options that select the same network."""
        config = self.config
        if config.model:
            args = "".join(f" --model-args {name}={value}" for name, value in config.model_args.items())
            return f"--model {config.model}{args}"
        return f"-l {config.depth}" if config.arch == "cifar" else f"--arch {config.arch}"

    @property
    def folder(self) -> Path:
        """Folder of all stages of a network."""
        config = self.config
        name = config.model or (f"resnet{config.depth}" if config.arch == "cifar" else config.arch)
        return self.save_dir or Path("runs") / f"{name}_{self.data}".replace(":", ".").replace("/", ".")

    def train(self, stage: str, folder: str, recipe: Callable[..., RecipeResult], **more: Any) -> None:
        """Run a recipe, in torchrun's process group if there is one; rank 0 shows progress and the result."""
        with process_group():
            run = functools.partial(
                recipe,
                self.images(),
                config=self.config,
                directory=self.folder / folder,
                resume=self.resume,
                **more,
            )
            if not is_main():
                run()
                return
            with progress_bars() as bars:
                result = run(progress=bars(stage))
            print_result(result)


def run_command(kind: type[RunConfig]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of RunFlags and of a recipe's settings to a command that takes a RunFlags first."""
    types = get_type_hints(kind)
    settings = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(kind, name, None),
            annotation=Annotated[_TYPES.get(name, types[name]), option],
        )
        for name, option in SETTINGS.items()
        if name in types
    ]
    _, *common = inspect.signature(RunFlags, eval_str=True).parameters.values()

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()

        @functools.wraps(command)
        def with_flags(**given: Any) -> None:
            if "layer_groups" in given:
                given["layer_groups"] = _by_layer(given["layer_groups"])
            given["model_args"] = arguments(given["model_args"])
            config = kind(**{parameter.name: given.pop(parameter.name) for parameter in settings})
            flags = {parameter.name: given.pop(parameter.name) for parameter in common}
            command(RunFlags(config=config, **flags), **given)

        signature = inspect.Signature([*own, *settings, *common])
        with_flags.__signature__ = signature  # type: ignore[attr-defined]
        with_flags.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        return with_flags

    return decorate


def arguments(given: Sequence[str] | None) -> dict[str, Any]:
    """Name -> value of every ``--model-args``; what is no Python literal is a string."""
    found: dict[str, Any] = {}
    for text in given or ():
        name, sign, value = text.partition("=")
        if not name.isidentifier() or not sign:
            raise DSPError(f"--model-args is {text!r}; expected NAME=VALUE such as num_classes=10")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def _by_layer(given: Sequence[str] | None) -> dict[str, int]:
    """Pattern -> G of every ``--layer-groups``."""
    found = {}
    for text in given or ():
        pattern, _, count = text.rpartition("=")
        if not pattern or not count.isdecimal():
            raise DSPPruningError(f"--layer-groups is {text!r}; expected PATTERN=G such as 'stage_3.*=8'")
        found[pattern] = int(count)
    return found
