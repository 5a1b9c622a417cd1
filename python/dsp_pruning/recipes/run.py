"""What the recipes share: the settings of a run, the device, the files that a finished run leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPError, DSPFormatError, DSPTrainingError
from dsp_kernels.whole_file import write_text
from dsp_pruning.data import TrainingData
from dsp_pruning.distributed import is_main, local_rank
from dsp_pruning.group_counts import GroupCount, by_pattern
from dsp_pruning.layers import select_layers
from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.models.imagenet import torchvision_resnet
from dsp_pruning.recipes.checkpoint import save_weights
from dsp_pruning.recipes.training import Score, Trainer, evaluate

__all__ = [
    "MODEL",
    "SUMMARY",
    "RecipeResult",
    "RunConfig",
    "conclude",
    "depth_of",
    "group_counts",
    "image_size_beside",
    "new_model",
    "pick_device",
]

MODEL = "model.pt"
SUMMARY = "summary.json"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings that every recipe has; each recipe adds its own and the published defaults.

    arch: ``cifar``, or a torchvision ResNet such as ``resnet18``. depth: of the CIFAR ResNet.
    seed: of the weights, the order of the batches, augmentation and noise.
    device: ``cpu``, ``cuda``, ``cuda:1`` ... or ``auto``, which is CUDA where there is one.
    precision: ``float32``, ``bfloat16`` or ``float16`` in forward and backward passes.
    channels_last: hold the weights in that order of memory: a fifth less time per step on a CPU.
    """

    arch: str = "cifar"
    depth: int = 20
    epochs: int
    batch_size: int = 128
    lr: float
    momentum: float = 0.9
    weight_decay: float
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    channels_last: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise DSPTrainingError(f"{name} is {value}; it must be a finite number of at least 0")

    def settings(self, data: TrainingData) -> dict[str, Any]:
        """What a resumed run must repeat: all but the device, as plain JSON, and the data set."""
        plain = json.loads(json.dumps(asdict(self)))
        plain.pop("device")
        return {**plain, "data": data.name, "train_images": len(data.train)}


@dataclass(frozen=True)
class RecipeResult:
    """What a recipe leaves.

    model: the chosen weights, on the run's device. validation, test: its scores there; test is read once.
    history: one row of metrics per epoch. extra: numbers of the recipe itself.
    path: the file ``[state_dict, accuracy]``, None without a directory. main: this process prints.
    """

    model: nn.Module
    validation: Score
    test: Score
    history: list[dict[str, float]]
    path: Path | None
    extra: dict[str, float] = field(default_factory=dict)
    main: bool = True


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one. Raises DSPError for a device that is not here."""
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise DSPError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def new_model(config: RunConfig, data: TrainingData, device: torch.device) -> nn.Module:
    """The network of a run, its first weights drawn from the run's seed alone."""
    if config.arch == "cifar":
        generator = torch.Generator().manual_seed(config.seed)
        model: nn.Module = cifar_resnet(config.depth, data.num_classes, data.channels, generator=generator)
    else:
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(config.seed)
            model = torchvision_resnet(config.arch, data.num_classes)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device)


def group_counts(
    model: nn.Module, example: Tensor, groups: int, layer_groups: Mapping[str, int]
) -> GroupCount:
    """G of every layer that learns groups, as the wrappers take it.

    example: (batch, channels, height, width). layer_groups: name pattern -> G; others have ``groups``.
    Raises DSPPruningError for a pattern that fits no layer.
    """
    if not layer_groups:
        return groups
    return by_pattern(groups, layer_groups, [layer.name for layer in select_layers(model, example)])


def depth_of(weights: Mapping[str, Tensor], path: str | Path) -> int:
    """Depth of the CIFAR ResNet that these weights belong to, read from their names.

    Raises DSPFormatError where they are those of another network.
    """
    blocks = {name.split(".")[1] for name in weights if name.startswith("stage_1.")}
    if not blocks or "conv_1_3x3.weight" not in weights:
        first = ", ".join(list(weights)[:3])
        raise DSPFormatError(f"{path} holds no CIFAR ResNet: its first tensors are {first}")
    return 6 * len(blocks) + 2


def conclude(recipe: str, trainer: Trainer, extra: Mapping[str, float] | None = None) -> RecipeResult:
    """Score the model as it now is, reading the test split for the first time, and write what is kept.

    extra: numbers of the recipe for ``summary.json``.
    """
    data, model = trainer.data, trainer.model
    validation, test = (evaluate(model, data, split) for split in (data.validation, data.test))
    path = None
    if trainer.directory is not None:
        path = trainer.directory / MODEL
    if path is not None and is_main():
        save_weights(path, model.state_dict(), test.accuracy)
        summary = {
            "recipe": recipe,
            "validation": asdict(validation),
            "test": asdict(test),
            **(extra or {}),
            "image_size": list(data.example().shape[2:]),
            "config": trainer.config,
        }
        write_text(path.with_name(SUMMARY), json.dumps(summary, indent=2) + "\n")
    return RecipeResult(model, validation, test, trainer.history, path, dict(extra or {}), is_main())


def image_size_beside(weights: Path) -> tuple[int, int] | None:
    """Height and width of the images that a run's weights were trained on, from the summary beside them."""
    try:
        height, width = json.loads(weights.with_name(SUMMARY).read_text(encoding="utf-8"))["image_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    sizes = isinstance(height, int) and isinstance(width, int) and min(height, width) > 0
    return (height, width) if sizes else None
