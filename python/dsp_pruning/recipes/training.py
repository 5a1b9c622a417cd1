"""The training loop of all recipes: epochs, metrics, checkpoints, resuming; and evaluation."""

import csv
import io
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dsp_kernels.errors import DSPTrainingError
from dsp_kernels.graph.network import evaluating
from dsp_kernels.whole_file import write_text
from dsp_pruning import distributed
from dsp_pruning.data import FolderSplit, Split, TrainingData
from dsp_pruning.data.batches import evaluation_batches, training_batches, training_steps
from dsp_pruning.distributed import is_main, rank, world_size
from dsp_pruning.recipes.checkpoint import load_checkpoint, remove_unfinished, save_checkpoint, save_weights
from dsp_pruning.recipes.run import METRICS, MODEL, SUMMARY, RunConfig, Schedule

_PRECISIONS = ("float32", "bfloat16", "float16")

# Called after every step with (steps done, total steps, text to show).
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Score:
    """accuracy: 0..1. loss: mean cross-entropy in nats. n: number of images."""

    accuracy: float
    loss: float
    n: int


@torch.inference_mode()
def evaluate(model: Callable[[Tensor], Tensor], data: TrainingData, split: Split | FolderSplit) -> Score:
    """Score a network on a split.

    model: images float32 (batch, channels, height, width) -> logits (batch, classes). A module runs in eval
    mode and gets its previous mode back. Collective: with several processes each scores its share of the
    images, and all get the same result.
    """
    correct, loss = 0, 0.0
    with evaluating(model) if isinstance(model, nn.Module) else nullcontext():
        for images, labels in evaluation_batches(data, split, rank=rank(), world_size=world_size()):
            logits = model(images).float()
            correct += int((logits.argmax(1) == labels).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
    sums = torch.tensor([correct, loss], dtype=torch.float64)
    distributed.all_reduce_mean([sums])
    accuracy, mean_loss = (sums * world_size() / len(split)).tolist()
    return Score(accuracy, mean_loss, len(split))


@dataclass(frozen=True)
class RecipeResult:
    """What a recipe returns.

    model: with the selected weights, on the run's device. validation, test: its scores.
    history: one row of metrics per epoch. path: of ``[state_dict, accuracy]``, None without a directory.
    extra: numbers of the recipe, such as ``pruned_flops``.
    """

    model: nn.Module
    validation: Score
    test: Score
    history: list[dict[str, float]]
    path: Path | None
    extra: dict[str, float] = field(default_factory=dict)


class Precision:
    """dtype of forward and backward passes; weights, optimizer and batch norm stay float32.

    name: ``float16`` scales the loss and skips a step whose gradients overflow. device: of the model.
    Raises DSPTrainingError for an unknown name.
    """

    def __init__(self, name: str = "float32", device: torch.device | str = "cpu") -> None:
        if name not in _PRECISIONS:
            raise DSPTrainingError(f"precision is {name!r}; expected one of {', '.join(_PRECISIONS)}")
        self.device_type = torch.device(device).type
        self.dtype: torch.dtype = getattr(torch, name)
        self.mixed = name != "float32"
        self.scaler = torch.amp.GradScaler(self.device_type, enabled=name == "float16")

    def autocast(self, enabled: bool = True) -> AbstractContextManager[None]:
        """Context of a forward pass. enabled=False sets only the dtype for autocast regions inside it."""
        # Without mixed precision not even a disabled autocast: on a CPU torch warns about float32.
        return torch.autocast(self.device_type, self.dtype, enabled) if self.mixed else nullcontext()


@dataclass(frozen=True, kw_only=True)
class Hook:
    """What a recipe does in the training loop.

    before_epoch: gets the number of the epoch, counted from 0. after_step: runs after the optimizer's step,
    before the update of the loss scale. state_dict, load_state_dict: for checkpoints. metrics: additional
    columns for the metrics of an epoch.
    """

    before_epoch: Callable[[int], None] = lambda epoch: None
    before_forward: Callable[[], None] = lambda: None
    after_step: Callable[[Tensor, Tensor, Precision], None] = lambda images, labels, precision: None
    state_dict: Callable[[], dict[str, Any]] = dict
    load_state_dict: Callable[[Mapping[str, Any]], None] = lambda state: None
    metrics: Callable[[], dict[str, float]] = dict


@dataclass(eq=False)
class Trainer:
    """Trains a model, keeps the best epoch by validation accuracy, and can be stopped and resumed.

    model: images -> logits. optimizer: over its parameters. data: on the model's device.
    schedule: factor of the optimizer's learning rates in an epoch. hook: what runs around every step.
    directory: of checkpoints, metrics and results; None writes nothing.
    choose_from: the first epoch, counted from 0, that may be the best one.

    With several processes (torchrun) each takes its share of every batch, gradients are averaged, and only
    rank 0 writes files. On a CPU, a run that was stopped and resumed equals an uninterrupted one bit for bit.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    data: TrainingData
    config: RunConfig
    schedule: Schedule
    hook: Hook = field(default_factory=Hook)
    directory: Path | None = None
    choose_from: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.config.seed)  # of shuffling and augmentation
        self.precision = Precision(self.config.precision, next(self.model.parameters()).device)
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self.best: dict[str, Any] = {}
        self._forward = self.model
        self._parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer, "hook": self.hook}
        self._parts["scaler"] = self.precision.scaler
        self._base_rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._steps = training_steps(self.data, self.config.batch_size, world_size())

    def run(self, progress: Progress | None = None, *, resume: bool = False) -> None:
        """Train up to the last epoch, then load the best one.

        resume: start from the last checkpoint of the directory.

        A run that is interrupted or killed keeps the checkpoint of its last complete epoch.
        Raises DSPTrainingError if the loss is not finite or the checkpoint has other settings, DSPFormatError
        if there is no readable checkpoint to resume from.
        """
        if resume:
            self._resume()
        elif not self.history:
            self._save()
        if self.epoch < self.config.epochs and distributed.is_distributed():
            device = next(self.model.parameters()).device
            devices = [device] if device.type == "cuda" else None
            self._forward = DistributedDataParallel(self.model, device_ids=devices)
        while self.epoch < self.config.epochs:
            self.hook.before_epoch(self.epoch)
            started = time.perf_counter()
            factor = self.schedule(self.epoch)
            for group, base in zip(self.optimizer.param_groups, self._base_rates, strict=True):
                group["lr"] = base * factor
            loss, accuracy = self._train_epoch(progress)
            distributed.broadcast_tensors(list(self.model.buffers()))  # processes differ in statistics
            score = evaluate(self.model, self.data, self.data.validation)
            self.epoch += 1
            row = {"epoch": self.epoch, "lr": self._base_rates[0] * factor}
            row |= {"train_loss": loss, "train_accuracy": accuracy}
            row |= {"validation_loss": score.loss, "validation_accuracy": score.accuracy}
            row |= self.hook.metrics() | {"seconds": time.perf_counter() - started}
            self.history.append(row)
            if self.epoch > self.choose_from:
                self._keep_best(score)
            self._save()
        if self.best:
            self.model.load_state_dict(self.best["model"])

    def conclude(self, recipe: str, extra: Mapping[str, float] | None = None) -> RecipeResult:
        """Score the model and write ``model.pt`` and ``summary.json``, with the numbers in ``extra``."""
        data = self.data
        validation, test = (evaluate(self.model, data, split) for split in (data.validation, data.test))
        path = None if self.directory is None else self.directory / MODEL
        if path is not None and is_main():
            save_weights(path, self.model.state_dict(), test.accuracy)
            scores = {"validation": asdict(validation), "test": asdict(test)}
            summary = {"recipe": recipe, **scores, **(extra or {})}
            summary |= {"image_size": list(data.image_hw), "config": self.config.settings(data)}
            write_text(path.with_name(SUMMARY), json.dumps(summary, indent=2) + "\n")
        return RecipeResult(self.model, validation, test, self.history, path, dict(extra or {}))

    def _resume(self) -> None:
        if self.directory is None:
            raise DSPTrainingError("a run without a directory has no checkpoint to resume from")
        if is_main():
            remove_unfinished(self.directory)
        state = load_checkpoint(self.directory)
        for name, value in self.config.settings(self.data).items():
            if state["config"].get(name, value) != value:
                raise DSPTrainingError(
                    f"cannot resume {self.directory}: its run has {name} = {state['config'][name]}, "
                    f"now it is {value}. Use the same settings or another directory"
                )
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_rng"])
        self.epoch, self.history = state["epoch"], state["history"]
        # Earlier versions also kept epochs before choose_from.
        self.best = state["best"] if state["best"].get("epoch", 0) > self.choose_from else {}

    def _train_epoch(self, progress: Progress | None) -> tuple[float, float]:
        self._forward.train()
        scaler = self.precision.scaler
        total_loss, correct, seen = 0.0, 0, 0
        batches = training_batches(self.data, self.config.batch_size, self.generator, rank(), world_size())
        for step, (images, labels) in enumerate(batches, start=1):
            self.hook.before_forward()
            with self.precision.autocast():
                logits = self._forward(images)
                loss = F.cross_entropy(logits, labels)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise DSPTrainingError(
                    f"the loss is {value} at epoch {self.epoch + 1}, step {step} of {self._steps}: "
                    f"a learning rate below {self.optimizer.param_groups[0]['lr']:g} may help"
                )
            self.optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(self.optimizer)
            self.hook.after_step(images, labels, self.precision)
            scaler.update()  # after its last use
            total_loss += value * len(labels)
            correct += int((logits.detach().argmax(1) == labels).sum())
            seen += len(labels)
            if progress is not None:
                shown = f"epoch {self.epoch + 1}/{self.config.epochs}, loss {total_loss / seen:.3f}"
                progress(self.epoch * self._steps + step, self.config.epochs * self._steps, shown)
        sums = torch.tensor([total_loss, correct, seen], dtype=torch.float64)
        distributed.all_reduce_mean([sums])
        total_loss, correct_all, seen_all = sums.tolist()
        return total_loss / seen_all, correct_all / seen_all

    def _keep_best(self, score: Score) -> None:
        # On a small split many epochs have the same accuracy; then the lower loss decides.
        if not self.best or (score.accuracy, -score.loss) > (self.best["accuracy"], -self.best["loss"]):
            model = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.best = {"epoch": self.epoch, "accuracy": score.accuracy, "loss": score.loss, "model": model}

    def _save(self) -> None:
        if self.directory is None or not is_main():
            return
        state: dict[str, Any] = {name: part.state_dict() for name, part in self._parts.items()}
        state |= {"generator": self.generator.get_state(), "torch_rng": torch.get_rng_state()}
        state |= {"epoch": self.epoch, "history": self.history, "best": self.best}
        save_checkpoint(self.directory, state | {"config": self.config.settings(self.data)})
        text = io.StringIO()
        if self.history:
            writer = csv.DictWriter(text, fieldnames=list(self.history[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.history)
        write_text(self.directory / METRICS, text.getvalue())
