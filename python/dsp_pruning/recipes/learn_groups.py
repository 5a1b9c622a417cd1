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
from dsp_pruning.recipes.run import RecipeResult, RunConfig, conclude, group_counts, new_model, pick_device
from dsp_pruning.recipes.schedules import cosine
from dsp_pruning.recipes.training import Hook, Progress, Trainer

__all__ = ["LearnGroupsConfig", "learn_groups"]


@dataclass(frozen=True, kw_only=True)
class LearnGroupsConfig(RunConfig):
    """The published settings of CIFAR-10: one cosine; regularisation grows linearly over the run.

    groups: G of every layer, but for those whose name fits a pattern of layer_groups, as of a shell
    (``stage_3.*``): these have that pattern's; of several that fit the last counts.
    regularize: the method's lambda. temperature: of the soft assignment.
    group_lr: learning rate of the logits.
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
    def __init__(self, learner: GroupWrapper, precision: Precision) -> None:
        self.learner = learner
        self.precision = precision

    def before_forward(self) -> None:
        self.learner.initialize()

    def after_step(self, images: Tensor, labels: Tensor) -> None:
        with self.precision.named():
            self.learner.after_step(images, labels, self.precision.mixed, self.precision.scaler)

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
    """Learn the groups; the last epoch is kept, because the groups are learned only then.

    weights: state dict of a trained dense network; ``source`` is what an error calls it.
    directory, resume: as in ``pretrain``.
    Raises DSPPruningError for more groups than filters, DSPTrainingError for a loss that is not finite.
    """
    config = config or LearnGroupsConfig()
    device = pick_device(config.device)
    data = data.to(device)
    model = new_model(config, data, device)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
    )
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
    precision = Precision(config.precision, device)
    trainer = Trainer(
        model,
        optimizer,
        data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        schedule=cosine(config.epochs),
        generator=torch.Generator().manual_seed(config.seed),
        hook=_LearnHook(learner, precision),
        directory=directory,
        config=config.settings(data),
        precision=precision,
    )
    if resume:
        trainer.resume()
    trainer.run(progress)
    return conclude("learn-groups", trainer)
