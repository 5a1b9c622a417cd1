"""Recipes stop and go on without a trace, and the validation split chooses."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from recipe_cases import Recipe, assert_same, interrupt_at
from torch import Tensor, nn

from dsp_kernels.errors import DSPFormatError, DSPTrainingError
from dsp_pruning.data import ImageData
from dsp_pruning.recipes import checkpoint as checkpoints
from dsp_pruning.recipes.checkpoint import load_checkpoint
from dsp_pruning.recipes.training import Hook, Trainer, evaluate


@pytest.mark.parametrize("step", [1, 5], ids=["first-epoch", "second-epoch"])
def test_a_resumed_run_equals_one_that_was_never_stopped(recipe: Recipe, tmp_path: Path, step: int) -> None:
    whole = recipe(None)
    with pytest.raises(KeyboardInterrupt):
        recipe(tmp_path, progress=interrupt_at(step))
    assert load_checkpoint(tmp_path)["epoch"] == (step - 1) // 3
    torch.manual_seed(99)  # the resumed process has another state of the global generator
    assert_same(recipe(tmp_path, resume=True), whole)


def test_a_corrupted_last_checkpoint_falls_back_to_the_one_before(recipe: Recipe, tmp_path: Path) -> None:
    whole = recipe(tmp_path)
    last = tmp_path / checkpoints.LAST
    last.write_bytes(last.read_bytes()[:-200])
    with pytest.warns(RuntimeWarning, match=r"going on from checkpoint\.previous\.pt"):
        again = recipe(tmp_path, resume=True)
    assert_same(again, whole)


def test_resuming_with_other_settings_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    recipe(tmp_path, epochs=1)
    with pytest.raises(DSPTrainingError, match=r"has lr = .*, now it is 0\.5"):
        recipe(tmp_path, epochs=1, lr=0.5, resume=True)


def test_resuming_without_a_checkpoint_is_a_clear_error(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(DSPFormatError, match="holds no checkpoint to resume from"):
        recipe(tmp_path / "nothing", resume=True)


def test_two_unreadable_checkpoints_are_a_clear_error(tmp_path: Path) -> None:
    for name in (checkpoints.LAST, checkpoints.PREVIOUS):
        (tmp_path / name).write_bytes(b"cut")
    with pytest.raises(DSPFormatError, match=r"checkpoint\.pt is not a readable.*previous\.pt is not"):
        load_checkpoint(tmp_path)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints.save_checkpoint(tmp_path, {"epoch": 1})

    def fail(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoints.save_checkpoint(tmp_path, {"epoch": 2})
    assert load_checkpoint(tmp_path)["epoch"] == 1
    assert [path.name for path in tmp_path.iterdir()] == [checkpoints.LAST]


class _Spoil(Hook):
    """Trains for two epochs of three steps, then sets all weights to zero."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps = 0

    def after_step(self, images: Tensor, labels: Tensor) -> None:
        self.steps += 1
        if self.steps > 6:
            for parameter in self.model.parameters():
                parameter.data.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


def _spoiled_trainer(data: ImageData, directory: Path) -> Trainer:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    return Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.05),
        data,
        epochs=3,
        batch_size=16,
        schedule=lambda epoch: 1.0,
        generator=torch.Generator().manual_seed(0),
        hook=_Spoil(model),
        directory=directory,
    )


@pytest.mark.parametrize("stopped", [False, True], ids=["in-one-go", "resumed"])
def test_the_validation_split_chooses_the_epoch(data: ImageData, tmp_path: Path, stopped: bool) -> None:
    """Later epochs do worse, the last one spoils all: the first is kept, by a resumed run too."""
    trainer = _spoiled_trainer(data, tmp_path)
    if stopped:
        with pytest.raises(KeyboardInterrupt):
            trainer.run(interrupt_at(4))
        trainer = _spoiled_trainer(data, tmp_path)
        assert trainer.resume() == 1
    reached = [row["validation_accuracy"] for row in trainer.run()]
    kept = trainer.load_best()
    assert kept == reached[0] == max(reached) > max(reached[1:])
    assert evaluate(trainer.model, data, data.validation).accuracy == kept
