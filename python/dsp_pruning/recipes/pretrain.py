"""Recipe 1: train the dense network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dsp_pruning.data import TrainingData
from dsp_pruning.recipes.precision import Precision
from dsp_pruning.recipes.run import RecipeResult, RunConfig, conclude, new_model, pick_device
from dsp_pruning.recipes.schedules import multi_step
from dsp_pruning.recipes.training import Progress, Trainer

__all__ = ["PretrainConfig", "pretrain"]


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """The published settings of CIFAR-10: x 0.1 at half and three quarters, two warm-up epochs at lr / 4."""

    epochs: int = 164
    lr: float = 0.1
    weight_decay: float = 1e-4
    warmup_epochs: int = 2


def pretrain(
    data: TrainingData,
    config: PretrainConfig | None = None,
    directory: Path | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> RecipeResult:
    """Train a CIFAR ResNet from its first weights; the validation split chooses the epoch that is kept.

    directory: gets checkpoints, ``metrics.csv``, ``summary.json`` and ``model.pt`` = [state_dict, accuracy].
    resume: go on from the last checkpoint there.
    Raises DSPTrainingError where the loss is no longer finite or the settings make no sense.
    """
    config = config or PretrainConfig()
    device = pick_device(config.device)
    data = data.to(device)
    model = new_model(config, data, device)
    trainer = Trainer(
        model,
        torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        ),
        data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        schedule=multi_step(config.epochs, warmup_epochs=config.warmup_epochs),
        generator=torch.Generator().manual_seed(config.seed),
        directory=directory,
        config=config.settings(data),
        precision=Precision(config.precision, device),
    )
    if resume:
        trainer.resume()
    trainer.run(progress)
    trainer.load_best()
    return conclude("pretrain", trainer)
