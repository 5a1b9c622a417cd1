"""The training commands in two processes: who writes, and what is lost when a process is killed."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed_recipe import finish, start

from dsp_pruning.recipes.checkpoint import load_checkpoint, load_weights

COMMON = ["-l", "8", "--data", "folder", "--image-size", "16", "--batch-size", "12", "--device", "cpu"]
LEARN, FINETUNE = "learn_groups_g2", "finetune_g2_p0.5"
Command = Callable[[str, Path], list[str]]
STAGES = {
    "pretrain": ["pretrain", "--epochs", "1"],
    LEARN: ["learn-groups", "-g", "2", "-r", "0.02", "--epochs", "8"],
    FINETUNE: ["finetune", "-g", "2", "-p", "0.5", "--epochs", "8", "--cycles", "4"],
}


@pytest.fixture(scope="module")
def command(image_folder: Path) -> Command:
    return lambda stage, folder: [
        *STAGES[stage],
        *COMMON,
        "--data-root",
        str(image_folder),
        "--save-dir",
        str(folder),
    ]


def run(folder: Path, *commands: list[str]) -> None:
    status = finish(start(folder, *commands))
    assert status == [0, 0], [(folder / f"output{rank}.txt").read_text()[-4000:] for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run of all stages."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, *(command(stage, folder) for stage in STAGES))
    return folder


def test_one_process_prints_and_writes(whole: Path) -> None:
    first, second = ((whole / f"output{rank}.txt").read_text() for rank in (0, 1))
    assert first.count("test:") == first.count("weights:") == len(STAGES)
    assert not [line for line in second.splitlines() if "Warning" not in line and not line.startswith(" ")]
    assert not list(whole.rglob("*.tmp*"))


@pytest.mark.parametrize("stage", [LEARN, FINETUNE])
def test_all_processes_hold_the_written_model(whole: Path, stage: str) -> None:
    written, _ = load_weights(whole / stage / "model.pt")
    for rank in (0, 1):
        model = torch.load(whole / f"{stage}.rank{rank}.pt", weights_only=True)
        assert model.keys() == written.keys()
        assert all(torch.equal(value, written[name]) for name, value in model.items())
    masks = [value for name, value in written.items() if name.endswith(".mask")]
    assert len(masks) == (6 if stage == FINETUNE else 0)
    assert all(0 < float(mask.mean()) < 1 for mask in masks)


def kill_after_an_epoch(folder: Path, kill: Callable[[], None]) -> None:
    metrics, limit = folder / "metrics.csv", time.monotonic() + 200
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 2:
        assert time.monotonic() < limit
        time.sleep(0.002)
    kill()


def resume(command: Command, whole: Path, folder: Path, stage: str) -> None:
    """The killed run resumes and ends with the bits of the uninterrupted one."""
    assert 1 <= load_checkpoint(folder / stage)["epoch"] < 8
    assert not (folder / stage / "model.pt").exists()
    run(folder, [*command(stage, folder), "--resume"])
    with (folder / stage / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == list("12345678")
    resumed, expected = (load_weights(f / stage / "model.pt")[0] for f in (folder, whole))
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def test_a_killed_process_ends_the_job_and_resuming_loses_nothing(
    command: Command, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / LEARN, tmp_path / LEARN)
    processes = start(tmp_path, command(FINETUNE, tmp_path))
    kill_after_an_epoch(tmp_path / FINETUNE, processes[1].kill)
    survivor, killed = finish(processes)
    assert killed == -signal.SIGKILL
    assert survivor
    resume(command, whole, tmp_path, FINETUNE)


def test_torchrun_ends_a_job_whose_process_is_killed(command: Command, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole / "pretrain", tmp_path / "pretrain")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    job = subprocess.Popen(
        [*torchrun, "-m", "dsp_cli.main", *command(LEARN, tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )

    def kill_rank_1() -> None:
        (rank_1,) = (
            int(process)
            for process in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
            if b"\0RANK=1\0" in Path(f"/proc/{process}/environ").read_bytes()
        )
        os.kill(rank_1, signal.SIGKILL)

    try:
        kill_after_an_epoch(tmp_path / LEARN, kill_rank_1)
        errors = job.communicate(timeout=200)[1]
    finally:
        job.kill()
    assert job.returncode != 0
    assert "Signal 9 (SIGKILL)" in errors
    resume(command, whole, tmp_path, LEARN)
