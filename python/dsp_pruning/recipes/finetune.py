"""Recipe 3: prune a network with learned groups to a rate, at once or in cycles, and train what is left."""

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
from dsp_pruning.recipes.run import (
    RecipeResult,
    RunConfig,
    conclude,
    depth_of,
    group_counts,
    new_model,
    pick_device,
)
from dsp_pruning.recipes.schedules import cosine
from dsp_pruning.recipes.training import Hook, Progress, Trainer, evaluate

__all__ = ["FinetuneConfig", "finetune", "load_pruned", "preview"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """The published settings of CIFAR-10: five cosine cycles, a little more pruned at the start of each.

    groups, layer_groups: G of every layer, as learned.
    prune: share of the grouped layers' cost to remove, 0..1.
    target: that cost, ``macs`` or ``params``. channel_multiple: see PruneWrapper.
    fp_every_nth_conv: which grouped layers also lose whole filters; 2 is the last conv of each basic block,
        3 that of each bottleneck. prune_channels: False prunes whole filters only.
    cycles: at most one for each epoch. one_shot: prune everything at the start of the first.
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
        """How often the network is pruned."""
        return 1 if self.one_shot else max(1, min(self.cycles, self.epochs))


class _PruneHook(Hook):
    """Prunes at the start of every cycle, and keeps at zero what is pruned."""

    def __init__(self, pruner: PruneWrapper, config: FinetuneConfig, data: TrainingData) -> None:
        self.pruner = pruner
        self.config = config
        self.data = data
        self.done = 0  # prunings
        self.just_pruned: dict[str, float] = {}

    def cycle(self, epoch: int) -> int:
        return epoch * self.config.prunings // max(1, self.config.epochs)

    def before_epoch(self, epoch: int) -> None:
        if self.cycle(epoch) >= self.done:
            self.prune(self.cycle(epoch))

    def prune(self, cycle: int) -> None:
        flops, params = self.pruner.initialize(self.config.prune, cycle, self.config.prunings)
        self.done = cycle + 1
        if self.done == self.config.prunings:
            score = evaluate(self.pruner.model, self.data, self.data.test)
            self.just_pruned = {
                "pruned_flops": flops,
                "pruned_params": params,
                "accuracy_before_finetuning": score.accuracy,
            }

    def after_step(self, images: Tensor, labels: Tensor) -> None:
        self.pruner.after_step()

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "just_pruned": self.just_pruned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.done, self.just_pruned = state["done"], dict(state["just_pruned"])


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
    """Prune and finetune; of the last cycle, the epoch that does best on the validation split is kept.

    weights: state dict with ``<conv>.group``; ``source`` is what an error calls it.
    directory, resume: as in ``pretrain``.
    The result's ``extra`` holds ``pruned_flops`` and ``pruned_params`` (percent of the grouped layers) and
    ``accuracy_before_finetuning``, on the test split just after the last pruning, 0..1; nothing is chosen
    by it.
    Raises DSPPruningError for a rate that cannot be reached, DSPTrainingError for a loss that is not finite.
    """
    config = config or FinetuneConfig()
    device = pick_device(config.device)
    data = data.to(device)
    pruner = _pruner(data, weights, config, source, device)
    model = pruner.model
    pruner.preview(config.prune)  # a rate out of reach is an error now, not in the last cycle
    hook = _PruneHook(pruner, config, data)
    trainer = Trainer(
        model,
        torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        ),
        data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        schedule=cosine(config.epochs, cycles=config.cycles),
        generator=torch.Generator().manual_seed(config.seed),
        hook=hook,
        directory=directory,
        config=config.settings(data),
        precision=Precision(config.precision, device),
        choose_from=next((e for e in range(config.epochs) if hook.cycle(e) == config.prunings - 1), 0),
    )
    if resume:
        trainer.resume()
    trainer.run(progress)
    trainer.load_best()
    if hook.done < config.prunings:  # without a single epoch nothing has started a cycle
        hook.prune(config.prunings - 1)
    return conclude("finetune", trainer, hook.just_pruned)


def preview(
    data: TrainingData,
    weights: Mapping[str, Tensor],
    config: FinetuneConfig | None = None,
    *,
    source: str | Path = "the given weights",
) -> tuple[tuple[float, float], PruningReport | None]:
    """What ``finetune`` would prune: the range of rates within reach, 0..1, and what its rate would keep.

    Nothing is trained or written. The report is None where the rate is out of reach.
    Raises DSPPruningError where no rate is within reach.
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
    """The masked dense network in a file that ``finetune`` wrote, in eval mode, ready to be packed.

    image_hw: height and width of one image.
    Raises DSPFormatError for a file that holds no pruned ResNet for CIFAR or of torchvision.
    """
    weights, _ = load_weights(path)
    variant = variant_of(weights)
    depth = 0 if variant else depth_of(weights, path)
    logits = {name: len(value) for name, value in weights.items() if name.endswith(".group")}
    if not logits or not any(name.endswith(".mask") for name in weights):
        raise DSPFormatError(f"{path} holds no group logits and masks: it must be a pruned network")
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
