"""What the recipes share: settings, device, network, learning rate schedules, names of files."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPError, DSPFormatError, DSPPruningError, DSPTrainingError
from dsp_kernels.graph.network import evaluating
from dsp_pruning.data import TrainingData
from dsp_pruning.distributed import local_rank
from dsp_pruning.layers import GroupCount, select_layers
from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.models.imagenet import torchvision_resnet
from dsp_pruning.named import make_model

Schedule = Callable[[int], float]  # epoch, counted from 0 -> factor of the base learning rate

MODEL, SUMMARY, METRICS = "model.pt", "summary.json", "metrics.csv"


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Settings of every recipe. Each recipe adds its own, with the published CIFAR-10 values as defaults.

    arch: ``cifar``, or a ResNet of torchvision such as ``resnet18``. depth: of the CIFAR ResNet.
    model, model_args: another network, ``package.module:function`` or ``timm/NAME``, and its arguments.
    batch_size: images per optimizer step, summed over all processes. lr: base learning rate.
    momentum, weight_decay: of SGD. seed: of initial weights, shuffling, augmentation and Gumbel noise.
    device: ``cpu``, ``cuda``, ``cuda:1``, ..., or ``auto``: CUDA if available.
    precision: of forward and backward passes: ``float32``, ``bfloat16`` or ``float16``.
    channels_last: memory format of the weights; saves a fifth of the time per step on a CPU.
    Raises DSPTrainingError for a value out of range.
    """

    arch: str = "cifar"
    depth: int = 20
    model: str = ""
    model_args: Mapping[str, Any] = field(default_factory=dict)
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
        return torch.optim.SGD(
            model.parameters(), lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay
        )


@dataclass(frozen=True, kw_only=True)
class GroupedConfig(RunConfig):
    """groups: G of every layer. layer_groups: shell pattern of layer names (``stage_3.*``) -> another G; the
    last match counts.
    """

    groups: int = 4
    layer_groups: Mapping[str, int] = field(default_factory=dict)

    def counts(self, model: nn.Module, example: Tensor) -> GroupCount:
        """``n_groups`` of the wrappers. Raises DSPPruningError for a pattern that matches no layer."""
        if not self.layer_groups:
            return self.groups
        names = [layer.name for layer in select_layers(model, example)]
        counts = dict.fromkeys(names, self.groups)
        for pattern, count in self.layer_groups.items():
            matching = [name for name in names if fnmatchcase(name, pattern)]
            if not matching:
                raise DSPPruningError(
                    f"the pattern {pattern!r} fits none of the {len(names)} layers that learn groups: "
                    f"{', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
                )
            counts |= dict.fromkeys(matching, count)
        return counts


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


def start(config: RunConfig, data: TrainingData) -> tuple[nn.Module, TrainingData]:
    """The network of a run, with initial weights that depend on the seed only, and the data on its device."""
    device = pick_device(config.device)
    model: nn.Module
    if config.model:
        model = _own_model(config, data)
    elif config.arch == "cifar":
        generator = torch.Generator().manual_seed(config.seed)
        model = cifar_resnet(config.depth, data.num_classes, data.channels, generator=generator)
    else:
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.manual_seed(config.seed)
            model = torchvision_resnet(config.arch, data.num_classes)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model.to(device), data.to(device)


def _own_model(config: RunConfig, data: TrainingData) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(config.seed)
        model = make_model(config.model, config.model_args)
        try:
            with evaluating(model):
                shape: Any = tuple(model(data.example()).shape)
        except Exception as error:
            shape = f"{type(error).__name__}: {error}"
    if shape != (1, data.num_classes):
        raise DSPError(
            f"{config.model} answers one image of {tuple(data.example().shape[1:])} with {shape}; data set "
            f"{data.name!r} needs logits of shape (1, {data.num_classes})"
        )
    return model


def multi_step(epochs: int, *, warmup_epochs: int = 0) -> Schedule:
    """1, 0.1 after half of the epochs and 0.01 after three quarters; 0.25 in the warm-up epochs.

    >>> factor = multi_step(100, warmup_epochs=2)
    >>> [round(factor(epoch), 4) for epoch in (0, 2, 50, 75)]
    [0.25, 1.0, 0.1, 0.01]
    """

    def factor(epoch: int) -> float:
        if epoch < warmup_epochs:
            return 0.25
        return 0.1 ** sum(epoch >= share * epochs for share in (0.5, 0.75))

    return factor


def cosine(epochs: int, *, cycles: int = 1) -> Schedule:
    """Half a cosine from 1 towards 0, repeated ``cycles`` times (Loshchilov and Hutter 2017).

    >>> factor = cosine(10, cycles=2)
    >>> [round(factor(epoch), 4) for epoch in (0, 4, 5)]
    [1.0, 0.0955, 1.0]
    """
    length = epochs / cycles
    return lambda epoch: 0.5 * (1 + math.cos(math.pi * (epoch % length) / length))


def depth_of(weights: Mapping[str, Tensor], path: str | Path) -> int:
    """Depth of the CIFAR ResNet that a state dict belongs to. Raises DSPFormatError for another network."""
    blocks = {name.split(".")[1] for name in weights if name.startswith("stage_1.")}
    if not blocks or "conv_1_3x3.weight" not in weights:
        raise DSPFormatError(
            f"{path} contains no CIFAR ResNet: its first tensors are {', '.join(list(weights)[:3])}; "
            "name another network with --model"
        )
    return 6 * len(blocks) + 2


def trained_image_size(weights: Path) -> tuple[int, int] | None:
    """Height and width of the training images, from the summary beside the weights; None if there is none."""
    try:
        height, width = json.loads(weights.with_name(SUMMARY).read_text(encoding="utf-8"))["image_size"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    valid = isinstance(height, int) and isinstance(width, int) and min(height, width) > 0
    return (height, width) if valid else None
