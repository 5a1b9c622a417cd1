"""Interrupted runs resume without a difference, and the validation split selects the epoch."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_cases import Recipe, assert_same, interrupt_at
from torch import nn

from dsp_kernels.errors import DSPFormatError, DSPTrainingError
from dsp_pruning.data import ImageData
from dsp_pruning.recipes.checkpoint import LAST, PREVIOUS, load_checkpoint
from dsp_pruning.recipes.pretrain import PretrainConfig
from dsp_pruning.recipes.training import Hook, Trainer, evaluate

SCRIPT = Path(__file__).parents[2] / "scripts" / "safety" / "kill_test.py"


@pytest.mark.parametrize("step", [1, 5], ids=["first-epoch", "second-epoch"])
def test_a_resumed_run_equals_an_uninterrupted_one(recipe: Recipe, tmp_path: Path, step: int) -> None:
    whole = recipe()
    with pytest.raises(KeyboardInterrupt):
        recipe(tmp_path, progress=interrupt_at(step))
    assert load_checkpoint(tmp_path)["epoch"] == (step - 1) // 3
    torch.manual_seed(99)  # another process would have another state of the global generator
    assert_same(recipe(tmp_path, resume=True), whole)


def test_a_run_that_is_killed_twice_equals_one_that_is_not() -> None:
    command = [sys.executable, str(SCRIPT), "--kills", "2", "--epochs", "2", "--longest", "0.5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kills in" in done.stdout
    assert "stages that differ: none" in done.stdout


def test_a_corrupted_checkpoint_falls_back_to_the_previous_one(recipe: Recipe, tmp_path: Path) -> None:
    whole = recipe(tmp_path)
    last = tmp_path / LAST
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.warns(RuntimeWarning, match=r"resuming from checkpoint\.previous\.pt"):
        assert_same(recipe(tmp_path, resume=True), whole)


def test_what_cannot_be_resumed_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    recipe(tmp_path, epochs=1)
    with pytest.raises(DSPTrainingError, match=r"has lr = .*, now it is 0\.5"):
        recipe(tmp_path, epochs=1, lr=0.5, resume=True)
    with pytest.raises(DSPFormatError, match="contains no checkpoint to resume from"):
        recipe(tmp_path / "nothing", resume=True)
    with pytest.raises(DSPTrainingError, match="without a directory"):
        recipe(None, resume=True)
    for name in (LAST, PREVIOUS):
        (tmp_path / name).write_bytes(b"cut")
    with pytest.raises(DSPFormatError, match=r"checkpoint\.pt is not a readable.*previous\.pt is not"):
        recipe(tmp_path, epochs=1, resume=True)


class _ZeroWeights:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps = 0

    def after_step(self, *_: object) -> None:
        self.steps += 1
        if self.steps > 6:
            for parameter in self.model.parameters():
                parameter.data.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


def _trainer(data: ImageData, directory: Path) -> Trainer:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    config = PretrainConfig(epochs=3, batch_size=16, lr=0.05, momentum=0, weight_decay=0)
    zero, optimizer = _ZeroWeights(model), config.optimizer(model)
    hook = Hook(after_step=zero.after_step, state_dict=zero.state_dict, load_state_dict=zero.load_state_dict)
    return Trainer(model, optimizer, data, config, schedule=lambda epoch: 1.0, hook=hook, directory=directory)


@pytest.mark.parametrize("stopped", [False, True], ids=["in-one-go", "resumed"])
def test_the_validation_split_selects_the_epoch(data: ImageData, tmp_path: Path, stopped: bool) -> None:
    """The first of three epochs is the best one, the last one sets the weights to zero."""
    trainer = _trainer(data, tmp_path)
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(interrupt_at(4))
        trainer = _trainer(data, tmp_path)
    trainer.run(resume=stopped)
    reached = [row["validation_accuracy"] for row in trainer.history]
    assert reached[0] > max(reached[1:])
    assert evaluate(trainer.model, data, data.validation).accuracy == reached[0]
