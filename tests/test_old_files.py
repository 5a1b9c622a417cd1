"""Files written by commit a908e13 load, answer and resume as they did there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from recipe_cases import TINY, few_digits, state
from safetensors.torch import load_file

import dsp_kernels
from dsp_pruning.models import cifar_resnet
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups

DATA = Path(__file__).resolve().parent / "data"
ANSWERS = load_file(DATA / "answers.safetensors")


@pytest.mark.parametrize("version", [2, 3])
def test_saved_networks_give_the_same_answers(version: int) -> None:
    network = dsp_kernels.load(DATA / f"version_{version}.safetensors")
    inputs = [ANSWERS["images"], *([ANSWERS["features"]] if version == 3 else [])]
    with torch.no_grad():
        torch.testing.assert_close(network(*inputs), ANSWERS[f"version_{version}"])


def test_an_exported_program_gives_the_same_answers() -> None:
    program = torch.export.load(DATA / "packed.pt2")
    torch.testing.assert_close(program.module()(ANSWERS["images"]), ANSWERS["pt2"])


def test_an_interrupted_training_run_resumes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(DATA / "learn_groups_run", run)
    weights = state(cifar_resnet(TINY["depth"], in_channels=1))  # replaced by those of the checkpoint
    result = learn_groups(few_digits(), weights, LearnGroupsConfig(**TINY, groups=2), run, resume=True)
    expected = json.loads((DATA / "learn_groups_run" / "history.json").read_text())
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    for row, old in zip(result.history, expected, strict=True):
        for name in ("lr", "step", "train_loss", "validation_loss", "penalty"):
            assert row[name] == pytest.approx(old[name], rel=1e-3), name
