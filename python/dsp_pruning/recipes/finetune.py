"""Recipe 3: prune a network with learned groups, at once or in cycles, and finetune it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPFormatError, DSPTrainingError
from dsp_pruning.data import TrainingData
from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.models.imagenet import torchvision_resnet, variant_of
from dsp_pruning.prune.report import PruningReport
from dsp_pruning.prune.wrapper import PruneWrapper, Target
from dsp_pruning.recipes.checkpoint import load_weights, restore_weights
from dsp_pruning.recipes.precision import Precision
from dsp_pruning.recipes.run import RunConfig, depth_of, group_counts, new_model, pick_device
from dsp_pruning.recipes.schedules import cosine
from dsp_pruning.recipes.training import Hook, Progress, RecipeResult, Trainer, evaluate


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """The published settings of CIFAR-10: five cosine cycles, each of which starts by pruning a little more.

    groups, layer_groups: G of every layer, as learned.
    prune: share of the grouped layers' cost to remove, 0..1. target: that cost, ``macs`` or ``params``.
    channel_multiple, fp_every_nth_conv, prune_channels: see PruneWrapper.
    cycles: cosine cycles. one_shot: prune to the full rate at the start of the first cycle.
    """

    epochs: int = 400
    lr: float = 0.015
    weight_decay: float = 1e-3
    groups: int = 4
    layer_groups: Mapping[str, int] = field(default_factory=dict)
    prune: float = 0.5
    target: Target = "macs"
    channel_multiple: int = 1
    fp_every_nth_conv: int = 2
    prune_channels: bool = True
    cycles: int = 5
    one_shot: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cycles < 1:
            raise DSPTrainingError(f"cycles is {self.cycles}; it must be at least 1")

    @property
    def prunings(self) -> int:
        """Number of prunings: one per cycle, at most one per epoch."""
        return 1 if self.one_shot else max(1, min(self.cycles, self.epochs))


class _PruneHook(Hook):
    """Prunes at the start of every cycle and keeps pruned weights at zero."""

    def __init__(self, pruner: PruneWrapper, config: FinetuneConfig, data: TrainingData) -> None:
        self.pruner = pruner
        self.config = config
        self.data = data
        self.prunings_done = 0
        self.just_pruned: dict[str, float] = {}

    def cycle(self, epoch: int) -> int:
        return epoch * self.config.prunings // max(1, self.config.epochs)

    def before_epoch(self, epoch: int) -> None:
        if self.cycle(epoch) >= self.prunings_done:
            self.prune(self.cycle(epoch))

    def prune(self, cycle: int) -> None:
        flops, params = self.pruner.initialize(self.config.prune, cycle, self.config.prunings)
        self.prunings_done = cycle + 1
        if self.prunings_done == self.config.prunings:
            score = evaluate(self.pruner.model, self.data, self.data.test)
            self.just_pruned = {
                "pruned_flops": flops,
                "pruned_params": params,
                "accuracy_before_finetuning": score.accuracy,
            }

    def after_step(self, images: Tensor, labels: Tensor, precision: Precision) -> None:
        self.pruner.after_step()

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.prunings_done, "just_pruned": self.just_pruned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.prunings_done, self.just_pruned = state["done"], dict(state["just_pruned"])


def finetune(
    data: TrainingData,
    weights: Mapping[str, Tensor],
    config: FinetuneConfig | None = None,
    directory: Path | None = None,
    *,
    source: str | Path = "the given weights",
    resume: bool = False,
    progress: Progress | None = None,
) -> RecipeResult:
    """Prune and finetune; keeps the epoch of the last cycle with the best validation accuracy.

    weights: state dict with the group logits ``<conv>.group``. source: its name in error messages.
    directory, resume: as in ``pretrain``.
    The result's ``extra`` has ``pruned_flops`` and ``pruned_params`` (percent of the grouped layers) and
    ``accuracy_before_finetuning`` (0..1, on the test split right after the last pruning).
    Raises DSPFormatError if the weights do not fit, DSPPruningError for an unreachable rate, DSPTrainingError
    if the loss is not finite or the checkpoint has other settings.

    >>> from dsp_pruning.data import load_digits
    >>> from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
    >>> from dsp_pruning.models import cifar_resnet
    >>> data, common = load_digits(size=8), {"depth": 8, "groups": 2, "epochs": 0, "device": "cpu"}
    >>> dense = cifar_resnet(8, in_channels=1).state_dict()
    >>> learned = learn_groups(data, dense, LearnGroupsConfig(**common)).model.state_dict()
    >>> result = finetune(data, learned, FinetuneConfig(**common, prune=0.5))
    >>> 50 <= result.extra["pruned_flops"] < 60
    True
    """
    config = config or FinetuneConfig()
    device = pick_device(config.device)
    data = data.to(device)
    pruner = _pruner(data, weights, config, source, device)
    model = pruner.model
    pruner.preview(config.prune)  # raise for an unreachable rate now, not in the last cycle
    hook = _PruneHook(pruner, config, data)
    trainer = Trainer(
        model,
        config.optimizer(model),
        data,
        config,
        schedule=cosine(config.epochs, cycles=config.cycles),
        hook=hook,
        directory=directory,
        choose_from=next((e for e in range(config.epochs) if hook.cycle(e) == config.prunings - 1), 0),
    )
    trainer.run(progress, resume=resume)
    trainer.load_best()
    if hook.prunings_done < config.prunings:  # with 0 epochs no cycle has started
        hook.prune(config.prunings - 1)
    return trainer.conclude("finetune", hook.just_pruned)


def preview(
    data: TrainingData,
    weights: Mapping[str, Tensor],
    config: FinetuneConfig | None = None,
    *,
    source: str | Path = "the given weights",
) -> tuple[tuple[float, float], PruningReport | None]:
    """Lowest and highest reachable rate, 0..1, and what ``finetune`` would keep at the rate of the config.

    Trains and writes nothing. The report is None if the rate is unreachable.
    Raises DSPPruningError if no rate is reachable.
    """
    config = config or FinetuneConfig()
    device = pick_device(config.device)
    pruner = _pruner(data.to(device), weights, config, source, device)
    low, high = pruner.reachable()
    return (low, high), pruner.preview(config.prune) if config.prune <= high else None


def _pruner(
    data: TrainingData,
    weights: Mapping[str, Tensor],
    config: FinetuneConfig,
    source: str | Path,
    device: torch.device,
) -> PruneWrapper:
    model = new_model(config, data, device)
    example = data.example().to(device)
    pruner = PruneWrapper(
        model,
        group_counts(model, example, config.groups, config.layer_groups),
        fp_every_nth_conv=config.fp_every_nth_conv,
        example_input=example,
        prune_channels=config.prune_channels,
        target=config.target,
        channel_multiple=config.channel_multiple,
    )
    restore_weights(model, weights, source, optional=(".mask",))
    return pruner


def load_pruned(path: str | Path, image_hw: tuple[int, int] = (32, 32)) -> nn.Module:
    """The masked network in a file that ``finetune`` wrote, in eval mode, ready for ``pack``.

    image_hw: height and width of the images.
    Raises DSPFormatError if the file contains no pruned ResNet for CIFAR or of torchvision.
    """
    weights, _ = load_weights(path)
    variant = variant_of(weights)
    depth = 0 if variant else depth_of(weights, path)
    logits = {name: len(value) for name, value in weights.items() if name.endswith(".group")}
    if not logits or not any(name.endswith(".mask") for name in weights):
        raise DSPFormatError(f"{path} contains no group logits and masks, so it is not a pruned network")
    if variant is not None:
        channels = 3
        model: nn.Module = torchvision_resnet(variant, weights["fc.weight"].shape[0])
    else:
        classes, channels = weights["classifier.weight"].shape[0], weights["conv_1_3x3.weight"].shape[1]
        model = cifar_resnet(depth, classes, channels)
    n_groups = {name.removesuffix(".group"): count for name, count in logits.items()}
    PruneWrapper(model, n_groups, fp_layer_indices=[], example_input=torch.zeros(1, channels, *image_hw))
    restore_weights(model, weights, path)
    return model.eval()
