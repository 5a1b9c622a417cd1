"""Recipe 1: train the dense network."""

from dataclasses import dataclass
from pathlib import Path

from dsp_pruning.data import TrainingData
from dsp_pruning.recipes.run import RunConfig, multi_step, start
from dsp_pruning.recipes.training import Progress, RecipeResult, Trainer


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """The published settings of CIFAR-10. warmup_epochs: with a quarter of the learning rate."""

    epochs: int = 164
    lr: float = 0.1
    weight_decay: float = 1e-4
    warmup_epochs: int = 2


def pretrain(
    data: TrainingData,
    config: PretrainConfig,
    directory: Path | None = None,
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> RecipeResult:
    """Train a dense ResNet and keep the epoch with the best validation accuracy.

    directory: gets checkpoints, ``metrics.csv``, ``summary.json`` and ``model.pt`` = [state_dict, accuracy].
    resume: continue from the last checkpoint in it.
    Raises DSPTrainingError if the loss is not finite or the checkpoint has other settings.
    """
    model, data = start(config, data)
    schedule = multi_step(config.epochs, warmup_epochs=config.warmup_epochs)
    trainer = Trainer(model, config.optimizer(model), data, config, schedule=schedule, directory=directory)
    trainer.run(progress, resume=resume)
    return trainer.conclude("pretrain")
