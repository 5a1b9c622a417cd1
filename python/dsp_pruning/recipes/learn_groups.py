"""Recipe 2: learn which filters form a group, from the weights of a trained dense network."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dsp_pruning.data import TrainingData, training_steps
from dsp_pruning.distributed import world_size
from dsp_pruning.learn.assign import assign_groups
from dsp_pruning.learn.wrapper import GroupWrapper, Init, SecondOrder
from dsp_pruning.recipes.checkpoint import restore_weights
from dsp_pruning.recipes.run import GroupedConfig, cosine, start
from dsp_pruning.recipes.training import Hook, Precision, Progress, RecipeResult, Trainer


@dataclass(frozen=True, kw_only=True)
class LearnGroupsConfig(GroupedConfig):
    """The published settings of CIFAR-10; the strength of the regulariser grows linearly over the run.

    regularize: lambda of the paper. temperature: of the Gumbel softmax. group_lr: of the group logits.
    second_order: ``exact``, ``none`` or ``original``, see GroupWrapper.
    init: ``random``, or ``weights``: begin with what ``assign_groups`` finds for the pruning rate ``prune``.
    """

    epochs: int = 120
    lr: float = 0.05
    weight_decay: float = 1e-3
    regularize: float = 2e-3
    temperature: float = 0.5
    group_lr: float = 1e-3
    second_order: SecondOrder = "exact"
    init: Init = "random"
    prune: float = 0.5


def learn_groups(
    data: TrainingData,
    weights: Mapping[str, Tensor],
    config: LearnGroupsConfig,
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
    """
    model, data = start(config, data)
    optimizer, example = config.optimizer(model), data.example()
    counts = config.counts(model, example)
    steps = max(1, config.epochs * training_steps(data, config.batch_size, world_size()))
    learner = GroupWrapper(
        model,
        optimizer,
        nn.CrossEntropyLoss(),
        config.regularize,
        steps,
        counts,
        config.temperature,
        group_optimizer_lr=config.group_lr,
        example_input=example,
        second_order=config.second_order,
        generator=torch.Generator().manual_seed(config.seed),
    )
    restore_weights(model, weights, source, optional=(".group",))
    if config.init == "weights":
        seeded = torch.Generator().manual_seed(config.seed)
        assign_groups(model, counts, config.prune, example_input=example, generator=seeded)
    hook = Hook(
        before_forward=learner.initialize,
        after_step=partial(_after_step, learner),
        state_dict=learner.state_dict,
        load_state_dict=learner.load_state_dict,
        metrics=learner.stats,
    )
    schedule, last = cosine(config.epochs), config.epochs - 1
    trainer = Trainer(model, optimizer, data, config, schedule, hook, directory, choose_from=last)
    trainer.run(progress, resume=resume)
    return trainer.conclude("learn-groups")


def _after_step(learner: GroupWrapper, images: Tensor, labels: Tensor, precision: Precision) -> None:
    with precision.autocast(enabled=False):
        scaler = precision.scaler if precision.scaler.is_enabled() else None
        learner.after_step(images, labels, precision.mixed, scaler)
