"""What the recipes share: settings, device, network, and the names of the files that a run leaves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPError, DSPFormatError, DSPTrainingError
from dsp_pruning.data import TrainingData
from dsp_pruning.distributed import local_rank
from dsp_pruning.group_counts import GroupCount, by_pattern
from dsp_pruning.layers import select_layers
from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.models.imagenet import torchvision_resnet

MODEL, SUMMARY, METRICS = "model.pt", "summary.json", "metrics.csv"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of every recipe. Each recipe adds its own, with the published CIFAR-10 values as defaults.

    arch: ``cifar``, or a ResNet of torchvision such as ``resnet18``. depth: of the CIFAR ResNet.
    batch_size: images per optimizer step, summed over all processes. lr: base learning rate.
    momentum, weight_decay: of SGD. seed: of initial weights, shuffling, augmentation and Gumbel noise.
    device: ``cpu``, ``cuda``, ``cuda:1``, ..., or ``auto``: CUDA if available.
    precision: of forward and backward passes: ``float32``, ``bfloat16`` or ``float16``.
    channels_last: memory format of the weights; saves a fifth of the time per step on a CPU.
    Raises DSPTrainingError for a value out of range.
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
                raise DSPTrainingError(f"{name} is {value}; it must be finite and at least 0")
        for name, least in (("epochs", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise DSPTrainingError(f"{name} is {getattr(self, name)}; it must be at least {least}")

    def settings(self, data: TrainingData) -> dict[str, Any]:
        """What must not change when a run is resumed, as plain JSON: all but the device, and the data set."""
        plain = json.loads(json.dumps(asdict(self)))
        plain.pop("device")
        return {**plain, "data": data.name, "train_images": len(data.train)}

    def optimizer(self, model: nn.Module) -> torch.optim.SGD:
        """SGD over all parameters of the model."""
        return torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )


def pick_device(name: str) -> torch.device:
    """The device of that name; ``auto`` is CUDA if available. Raises DSPError if it cannot be used."""
    if name == "auto":
        return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise DSPError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def new_model(config: RunConfig, data: TrainingData, device: torch.device) -> nn.Module:
    """The network of a run, with initial weights that depend on the seed only."""
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
    """``n_groups`` of the wrappers: groups for every layer, but for those that match a pattern.

    example: (batch, channels, height, width). layer_groups: pattern of layer names -> G.
    Raises DSPPruningError for a pattern that matches no layer.
    """
    if not layer_groups:
        return groups
    return by_pattern(groups, layer_groups, [layer.name for layer in select_layers(model, example)])


def depth_of(weights: Mapping[str, Tensor], path: str | Path) -> int:
    """Depth of the CIFAR ResNet that a state dict belongs to, from its names.

    Raises DSPFormatError for the state dict of another network.
    """
    blocks = {name.split(".")[1] for name in weights if name.startswith("stage_1.")}
    if not blocks or "conv_1_3x3.weight" not in weights:
        first = ", ".join(list(weights)[:3])
        raise DSPFormatError(f"{path} contains no CIFAR ResNet: its first tensors are {first}")
    return 6 * len(blocks) + 2


def trained_image_size(weights: Path) -> tuple[int, int] | None:
    """Height and width of the training images, from the summary beside the weights; None if there is none."""
    try:
        height, width = json.loads(weights.with_name(SUMMARY).read_text(encoding="utf-8"))["image_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    valid = isinstance(height, int) and isinstance(width, int) and min(height, width) > 0
    return (height, width) if valid else None
