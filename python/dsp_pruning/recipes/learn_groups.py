"""Recipe 2: learn which filters form a group, from the weights of a trained dense network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dsp_pruning.data import TrainingData, training_steps
from dsp_pruning.distributed import world_size
from dsp_pruning.learn.wrapper import GroupWrapper, SecondOrder
from dsp_pruning.recipes.checkpoint import restore_weights
from dsp_pruning.recipes.precision import Precision
from dsp_pruning.recipes.run import RunConfig, group_counts, new_model, pick_device
from dsp_pruning.recipes.schedules import cosine
from dsp_pruning.recipes.training import Hook, Progress, RecipeResult, Trainer


@dataclass(frozen=True, kw_only=True)
class LearnGroupsConfig(RunConfig):
    """The published settings of CIFAR-10; the strength of the regulariser grows linearly over the run.

    groups: G of every layer. layer_groups: shell pattern of layer names (``stage_3.*``) -> another G; the
        last match counts.
    regularize: lambda of the paper. temperature: of the Gumbel softmax. group_lr: of the group logits.
    second_order: ``exact``, ``none`` or ``original``, see GroupWrapper.
    """

    epochs: int = 120
    lr: float = 0.05
    weight_decay: float = 1e-3
    groups: int = 4
    layer_groups: Mapping[str, int] = field(default_factory=dict)
    regularize: float = 2e-3
    temperature: float = 0.5
    group_lr: float = 1e-3
    second_order: SecondOrder = "exact"


class _LearnHook(Hook):
    def __init__(self, learner: GroupWrapper) -> None:
        self.learner = learner

    def before_forward(self) -> None:
        self.learner.initialize()

    def after_step(self, images: Tensor, labels: Tensor, precision: Precision) -> None:
        with precision.autocast(enabled=False):
            self.learner.after_step(images, labels, precision.mixed, precision.scaler)

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.learner.load_state_dict(state)

    def metrics(self) -> dict[str, float]:
        return self.learner.stats()


def learn_groups(
    data: TrainingData,
    weights: Mapping[str, Tensor],
    config: LearnGroupsConfig | None = None,
    directory: Path | None = None,
    *,
    source: str | Path = "the given weights",
    resume: bool = False,
    progress: Progress | None = None,
) -> RecipeResult:
    """Learn the groups. The last epoch is kept, because the regulariser reaches its full strength only there.

    weights: state dict of a trained dense network. source: its name in error messages.
    directory, resume: as in ``pretrain``.
    Raises DSPFormatError if the weights do not fit, DSPPruningError for more groups than filters,
    DSPTrainingError if the loss is not finite or the checkpoint has other settings.

    >>> from dsp_pruning.data import load_digits
    >>> from dsp_pruning.models import cifar_resnet
    >>> config = LearnGroupsConfig(depth=8, groups=2, epochs=0, device="cpu")
    >>> result = learn_groups(load_digits(), cifar_resnet(8, in_channels=1).state_dict(), config)
    >>> result.model.state_dict()["stage_1.0.conv_a.group"].shape  # logits [G, O]
    torch.Size([2, 16])
    """
    config = config or LearnGroupsConfig()
    device = pick_device(config.device)
    data = data.to(device)
    model = new_model(config, data, device)
    optimizer = config.optimizer(model)
    example = data.example().to(device)
    learner = GroupWrapper(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        config.regularize,
        max(1, config.epochs * training_steps(data, config.batch_size, world_size())),
        n_groups=group_counts(model, example, config.groups, config.layer_groups),
        temp=config.temperature,
        group_optimizer_lr=config.group_lr,
        example_input=example,
        second_order=config.second_order,
        generator=torch.Generator().manual_seed(config.seed),
    )
    restore_weights(model, weights, source, optional=(".group",))
    trainer = Trainer(
        model,
        optimizer,
        data,
        config,
        schedule=cosine(config.epochs),
        hook=_LearnHook(learner),
        directory=directory,
    )
    trainer.run(progress, resume=resume)
    return trainer.conclude("learn-groups")
