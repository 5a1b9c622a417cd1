"""The one training loop of all recipes: epochs, checkpoints, metrics, resuming."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dsp_kernels.errors import DSPTrainingError
from dsp_kernels.whole_file import write_text
from dsp_pruning.data import TrainingData, training_batches, training_steps
from dsp_pruning.distributed import (
    all_reduce_mean,
    broadcast_tensors,
    is_distributed,
    is_main,
    rank,
    world_size,
)
from dsp_pruning.recipes.checkpoint import (
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
)
from dsp_pruning.recipes.evaluation import Score, evaluate
from dsp_pruning.recipes.precision import Precision
from dsp_pruning.recipes.schedules import Schedule

__all__ = ["METRICS", "Hook", "Progress", "Score", "Trainer", "evaluate"]

# Called after every step with (steps done, steps in all, what to show).
Progress = Callable[[int, int, str], None]

METRICS = "metrics.csv"


class Hook:
    """What a recipe does around every training step. This one does nothing."""

    def before_epoch(self, epoch: int) -> None:
        """Runs before an epoch, counted from 0; a resumed run calls it for the epoch it goes on with."""

    def before_forward(self) -> None:
        """Runs before the model sees a batch."""

    def after_step(self, images: Tensor, labels: Tensor) -> None:
        """Runs after the optimizer has moved the weights."""

    def state_dict(self) -> dict[str, Any]:
        """All that the hook needs to go on from a checkpoint."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``state_dict`` gave."""

    def metrics(self) -> dict[str, float]:
        """Columns that the hook adds to the metrics of an epoch."""
        return {}


class Trainer:
    """Trains a model for some epochs, keeps the best by validation, and can stop and go on at any epoch.

    model: images -> logits. optimizer: over its parameters; its learning rates are those of ``schedule`` 1.
    data: on the model's device. directory: where checkpoints and metrics go; None keeps nothing.
    config: plain settings, kept in the checkpoint; a resumed run must have the same ones.
    hook: what runs around each step. generator: the CPU generator of shuffling and augmentation.
    precision: of the forward and backward passes. choose_from: the first epoch, counted from 0, whose weights
        may be kept as the best.

    Where several processes train (torchrun), each takes its part of every batch of ``batch_size`` images, the
    gradients are averaged, and only process 0 writes files. On the CPU a run that was stopped and
    resumed equals one that was not, bit for bit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: TrainingData,
        *,
        epochs: int,
        batch_size: int,
        schedule: Schedule,
        generator: torch.Generator,
        hook: Hook | None = None,
        directory: Path | None = None,
        config: Mapping[str, Any] | None = None,
        precision: Precision | None = None,
        choose_from: int = 0,
    ) -> None:
        if epochs < 0 or batch_size < 1:
            raise DSPTrainingError(f"epochs is {epochs} and batch size {batch_size}: need >= 0 and >= 1")
        self.model = model
        self._forward = model
        self.optimizer = optimizer
        self.data = data
        self.epochs = epochs
        self.batch_size = batch_size
        self.schedule = schedule
        self.generator = generator
        self.hook = hook or Hook()
        self.directory = directory
        self.config = dict(config or {})
        self.precision = precision or Precision()
        self.choose_from = choose_from
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        self._base_rates = [float(group["lr"]) for group in optimizer.param_groups]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self._steps()

    def run(self, progress: Progress | None = None) -> list[dict[str, float]]:
        """Train up to the last epoch and return one row of metrics per epoch.

        Interrupting it (KeyboardInterrupt) leaves the checkpoint of the last whole epoch.
        Raises DSPTrainingError where the loss is no longer finite.
        """
        if self.epoch == 0 and not self.history:
            self._save()
        if self.epoch < self.epochs:
            self._forward = self._for_all_processes()
        while self.epoch < self.epochs:
            self.hook.before_epoch(self.epoch)
            started = time.perf_counter()
            rate = self._set_rates()
            loss, accuracy = self._train_epoch(progress)
            broadcast_tensors(list(self.model.buffers()))  # each process has its own statistics of batch norm
            score = evaluate(self.model, self.data, self.data.validation)
            self.epoch += 1
            self.history.append(
                {
                    "epoch": self.epoch,
                    "lr": rate,
                    "train_loss": loss,
                    "train_accuracy": accuracy,
                    "validation_loss": score.loss,
                    "validation_accuracy": score.accuracy,
                    **self.hook.metrics(),
                    "seconds": time.perf_counter() - started,
                }
            )
            if self.epoch > self.choose_from:
                self._keep_best(score)
            self._save()
        return self.history

    def resume(self) -> int:
        """Go on from the newest readable checkpoint of the directory; returns the epochs already done.

        Raises DSPFormatError where there is none, DSPTrainingError where its settings are not these.
        """
        if self.directory is None:
            raise DSPTrainingError("a run without a directory has no checkpoint to resume from")
        if is_main():
            remove_unfinished(self.directory)
        state = load_checkpoint(self.directory)
        for name, value in self.config.items():
            if state["config"].get(name, value) != value:
                raise DSPTrainingError(
                    f"cannot resume {self.directory}: its run has {name} = {state['config'][name]}, "
                    f"now it is {value}. Give the same settings or another directory"
                )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.hook.load_state_dict(state["hook"])
        if self.precision.scaler is not None:
            self.precision.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        self.epoch, self.history, self.best = state["epoch"], state["history"], state["best"]
        return self.epoch

    def load_best(self) -> float:
        """Put the weights that did best on the validation split into the model; returns their accuracy."""
        if not self.best:
            return evaluate(self.model, self.data, self.data.validation).accuracy
        self.model.load_state_dict(self.best["model"])
        return float(self.best["accuracy"])

    def _steps(self) -> int:
        return training_steps(self.data, self.batch_size, world_size())

    def _for_all_processes(self) -> nn.Module:
        if not is_distributed():
            return self.model
        device = next(self.model.parameters()).device
        return DistributedDataParallel(self.model, device_ids=[device] if device.type == "cuda" else None)

    def _train_epoch(self, progress: Progress | None) -> tuple[float, float]:
        self._forward.train()
        steps = self._steps()
        total_loss, correct, seen = 0.0, 0, 0
        for step, (images, labels) in enumerate(
            training_batches(self.data, self.batch_size, self.generator, rank(), world_size()), start=1
        ):
            self.hook.before_forward()
            with self.precision.autocast():
                logits = self._forward(images)
                loss = F.cross_entropy(logits, labels)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DSPTrainingError(
                    f"the loss is {value} at epoch {self.epoch + 1}, step {step} of {steps}: "
                    f"a learning rate below {self.optimizer.param_groups[0]['lr']:g} may help"
                )
            self.precision.step(loss, self.optimizer)
            self.hook.after_step(images, labels)
            self.precision.update()
            total_loss += value * len(labels)
            correct += int((logits.detach().argmax(1) == labels).sum())
            seen += len(labels)
            if progress is not None:
                shown = f"epoch {self.epoch + 1}/{self.epochs}, loss {total_loss / seen:.3f}"
                progress(self.epoch * steps + step, self.total_steps, shown)
        sums = torch.tensor([total_loss, correct, seen], dtype=torch.float64)
        all_reduce_mean([sums])
        total_loss, correct_all, seen_all = sums.tolist()
        return total_loss / seen_all, correct_all / seen_all

    def _set_rates(self) -> float:
        factor = self.schedule(self.epoch)
        for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * factor
        return self._base_rates[0] * factor

    def _keep_best(self, score: Score) -> None:
        # On a small split many epochs reach the same accuracy; then the lower loss decides.
        rank = (score.accuracy, -score.loss)
        if not self.best or rank > (self.best["accuracy"], -self.best["loss"]):
            model = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.best = {
                "epoch": self.epoch,
                "accuracy": score.accuracy,
                "loss": score.loss,
                "model": model,
            }

    def _save(self) -> None:
        if self.directory is None or not is_main():
            return
        save_checkpoint(
            self.directory,
            {
                "config": self.config,
                "epoch": self.epoch,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "hook": self.hook.state_dict(),
                "scaler": {} if self.precision.scaler is None else self.precision.scaler.state_dict(),
                "generator": self.generator.get_state(),
                "torch_rng": torch.get_rng_state(),
                "history": self.history,
                "best": self.best,
            },
        )
        write_text(self.directory / METRICS, _as_csv(self.history))


def _as_csv(rows: list[dict[str, float]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()
