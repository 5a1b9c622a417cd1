"""Recipe 3: prune a network with learned groups, at once or in cycles, and finetune it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPFormatError, DSPTrainingError
from dsp_kernels.file.save_load import input_channels
from dsp_pruning.data import TrainingData
from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.models.imagenet import torchvision_resnet, variant_of
from dsp_pruning.prune.report import PruningReport
from dsp_pruning.prune.wrapper import PruneWrapper, Target
from dsp_pruning.recipes.checkpoint import load_weights, restore_weights
from dsp_pruning.recipes.run import GroupedConfig, cosine, depth_of, start
from dsp_pruning.recipes.training import Hook, Progress, RecipeResult, Trainer, evaluate


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(GroupedConfig):
    """The published settings of CIFAR-10: five cosine cycles, each of which starts by pruning a little more.

    groups, layer_groups: as learned.
    prune: share of the grouped layers' cost to remove, 0..1. target: that cost, ``macs``, ``params`` or
        ``time``, of calls with ``batch`` images.
    channel_multiple, fp_every_nth_conv, prune_channels: see PruneWrapper.
    cycles: cosine cycles. one_shot: prune to the full rate at the start of the first cycle.
    """

    epochs: int = 400
    lr: float = 0.015
    weight_decay: float = 1e-3
    prune: float = 0.5
    target: Target = "macs"
    batch: int = 1
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


@dataclass
class _Cycles:
    """Prunes at the start of every cycle. just_pruned: numbers of the last pruning."""

    pruner: PruneWrapper
    config: FinetuneConfig
    data: TrainingData
    prunings_done: int = 0
    just_pruned: dict[str, float] = field(default_factory=dict)

    def cycle(self, epoch: int) -> int:
        return epoch * self.config.prunings // max(1, self.config.epochs)

    def before_epoch(self, epoch: int) -> None:
        if self.cycle(epoch) >= self.prunings_done:
            self.prune(self.cycle(epoch))

    def prune(self, cycle: int) -> None:
        flops, params = self.pruner.initialize(self.config.prune, cycle, self.config.prunings)
        self.prunings_done = cycle + 1
        if self.prunings_done == self.config.prunings:
            accuracy = evaluate(self.pruner.model, self.data, self.data.test).accuracy
            self.just_pruned = {"pruned_flops": flops, "pruned_params": params}
            self.just_pruned["accuracy_before_finetuning"] = accuracy

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.prunings_done, "just_pruned": self.just_pruned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.prunings_done, self.just_pruned = state["done"], dict(state["just_pruned"])


def finetune(
    data: TrainingData,
    weights: Mapping[str, Tensor],
    config: FinetuneConfig,
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
    """
    pruner, data = _pruner(data, weights, config, source)
    pruner.preview(config.prune)  # raise for an unreachable rate now, not in the last cycle
    cycles = _Cycles(pruner, config, data)
    hook = Hook(
        before_epoch=cycles.before_epoch,
        after_step=lambda *_: pruner.after_step(),
        state_dict=cycles.state_dict,
        load_state_dict=cycles.load_state_dict,
    )
    last = next((e for e in range(config.epochs) if cycles.cycle(e) == config.prunings - 1), 0)
    optimizer, schedule = config.optimizer(pruner.model), cosine(config.epochs, cycles=config.cycles)
    trainer = Trainer(pruner.model, optimizer, data, config, schedule, hook, directory, choose_from=last)
    trainer.run(progress, resume=resume)
    if cycles.prunings_done < config.prunings:  # with 0 epochs no cycle has started
        cycles.prune(config.prunings - 1)
    return trainer.conclude("finetune", cycles.just_pruned)


def preview(
    data: TrainingData,
    weights: Mapping[str, Tensor],
    config: FinetuneConfig,
    *,
    source: str | Path = "the given weights",
) -> tuple[tuple[float, float], PruningReport | None]:
    """Lowest and highest reachable rate, 0..1, and what ``finetune`` would keep; None for a rate beyond."""
    pruner, _ = _pruner(data, weights, config, source)
    low, high = pruner.reachable()
    return (low, high), pruner.preview(config.prune) if config.prune <= high else None


def _pruner(
    data: TrainingData, weights: Mapping[str, Tensor], config: FinetuneConfig, source: str | Path
) -> tuple[PruneWrapper, TrainingData]:
    model, data = start(config, data)
    example = data.example()
    pruner = PruneWrapper(
        model,
        config.counts(model, example),
        fp_every_nth_conv=config.fp_every_nth_conv,
        example_input=example,
        prune_channels=config.prune_channels,
        target=config.target,
        batch=config.batch,
        channel_multiple=config.channel_multiple,
    )
    restore_weights(model, weights, source, optional=(".mask",))
    return pruner, data


def load_pruned(
    path: str | Path, image_hw: tuple[int, int] = (32, 32), model: nn.Module | None = None
) -> nn.Module:
    """The masked network in a file that ``finetune`` wrote, in eval mode, for images of this size.

    model: the network of a run with ``--model``; it gets the weights.
    Raises DSPFormatError if the file contains no pruned network, or none for CIFAR or of torchvision and no
    model is given.
    """
    weights, _ = load_weights(path)
    n_groups = {name.removesuffix(".group"): len(w) for name, w in weights.items() if name.endswith(".group")}
    if not n_groups or not any(name.endswith(".mask") for name in weights):
        raise DSPFormatError(f"{path} contains no group logits and masks, so it is not a pruned network")
    if model is not None:
        channels = input_channels(model)
    elif variant := variant_of(weights):
        channels, model = 3, torchvision_resnet(variant, weights["fc.weight"].shape[0])
    else:
        depth = depth_of(weights, path)
        classes, channels = weights["classifier.weight"].shape[0], weights["conv_1_3x3.weight"].shape[1]
        model = cifar_resnet(depth, classes, channels)
    example = torch.zeros(1, channels, *image_hw)
    PruneWrapper(
        model, n_groups, fp_layer_indices=[], example_input=example, layers=lambda name, _: name in n_groups
    )
    restore_weights(model, weights, path)
    return model.eval()
