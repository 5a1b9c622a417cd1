"""``dsp learn-groups`` and ``dsp finetune`` as two real processes: who writes, and what a kill costs."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helpers import HERE, finish, start, tail

from dsp_cli.main import main
from dsp_pruning.recipes.checkpoint import load_checkpoint, load_weights

SCRIPT = "distributed_recipe.py"
COMMON = ["-l", "8", "--data", "digits", "--batch-size", "256", "--lr", "0.05", "--device", "cpu"]
STAGES = {
    "learn_groups_g2": ["learn-groups", "-g", "2", "-r", "0.02", "--epochs", "3"],
    "finetune_g2_p0.5": ["finetune", "-g", "2", "-p", "0.5", "--epochs", "3", "--cycles", "3"],
}


def flags(stage: str, folder: Path) -> list[str]:
    return [*STAGES[stage], *COMMON, "--save-dir", str(folder)]


def run(stage: str, folder: Path, *more: str) -> list[str]:
    """Output of each of two processes that end well."""
    outputs = []
    for status, output in finish(start(SCRIPT, 2, folder, "live", *flags(stage, folder), *more), 200):
        assert status == 0, tail(output)
        outputs.append(output)
    return outputs


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Both stages as two processes that nobody kills: the folder, the outputs, what each rank held."""
    folder = tmp_path_factory.mktemp("whole")
    assert main(["pretrain", *COMMON, "--epochs", "1", "--save-dir", str(folder)]) == 0
    found: dict[str, Any] = {"folder": folder}
    for stage in STAGES:
        outputs = run(stage, folder)
        ranks = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
        found[stage] = (outputs, ranks)
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_all_ranks_hold_the_same_and_one_prints_and_writes(whole: dict[str, Any], stage: str) -> None:
    (first, second), (mine, other) = whole[stage]
    assert "test:" in first
    assert "weights:" in first
    assert not [line for line in second.splitlines() if "Warning" not in line and not line.startswith(" ")]
    assert mine.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in mine.items())
    written, _ = load_weights(whole["folder"] / stage / "model.pt")
    assert all(torch.equal(value, mine[name]) for name, value in written.items())
    if stage.startswith("finetune"):
        masks = [value for name, value in mine.items() if name.endswith(".mask")]
        assert len(masks) == 6
        assert all(0 < float(mask.mean()) < 1 for mask in masks)
    assert not [path.name for path in whole["folder"].rglob("*.tmp*")]


@pytest.mark.parametrize(("stage", "by_torchrun"), list(zip(STAGES, (True, False), strict=True)))
def test_a_killed_rank_ends_the_job_and_resuming_loses_nothing(
    whole: dict[str, Any], stage: str, by_torchrun: bool, tmp_path: Path
) -> None:
    for before in ("pretrain", "learn_groups_g2"):
        if before != stage:
            shutil.copytree(whole["folder"] / before, tmp_path / before)
            (tmp_path / before / "metrics.csv").unlink()  # the child waits for those of its own stage
    if by_torchrun:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        done = subprocess.run(
            [*command, str(HERE / SCRIPT), str(tmp_path), "die", *flags(stage, tmp_path)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert done.returncode != 0
        assert "Signal 9 (SIGKILL)" in done.stderr, tail(done.stderr)
    else:
        survivor, killed = finish(start(SCRIPT, 2, tmp_path, "die", *flags(stage, tmp_path)), 200)
        assert killed[0] == -9
        assert survivor[0] > 0, tail(survivor[1])
    assert 1 <= load_checkpoint(tmp_path / stage)["epoch"] < 3
    assert not (tmp_path / stage / "model.pt").exists()
    run(stage, tmp_path, "--resume")
    with (tmp_path / stage / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]
    again, expected = (load_weights(f / stage / "model.pt")[0] for f in (tmp_path, whole["folder"]))
    assert all(torch.equal(value, again[name]) for name, value in expected.items())
