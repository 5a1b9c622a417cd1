"""The training commands in two processes: who writes, and what is lost when a process is killed."""

import csv
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from dsp_cli.main import main
from dsp_pruning.distributed import rank
from dsp_pruning.recipes import finetune, learn_groups
from dsp_pruning.recipes.checkpoint import load_checkpoint, load_weights

COMMON = ["-l", "8", "--data", "folder", "--image-size", "16", "--batch-size", "12", "--device", "cpu"]
LEARN, FINETUNE = "learn_groups_g2", "finetune_g2_p0.5"
STAGES = {
    "pretrain": ["pretrain", "--epochs", "1"],
    LEARN: ["learn-groups", "-g", "2", "-r", "0.02", "--epochs", "8"],
    FINETUNE: ["finetune", "-g", "2", "-p", "0.5", "--epochs", "8", "--cycles", "4"],
}
Command = Callable[[str, Path], list[str]]

FORKSERVER = multiprocessing.get_context("forkserver")  # imports torch once for all processes
FORKSERVER.set_forkserver_preload(["dsp_cli.app"])


def start(folder: Path, *commands: list[str]) -> list[ForkServerProcess]:
    """Run the commands one after the other in two processes that print to ``folder/output<rank>.txt``."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in commands]
    jobs = [(probe.getsockname()[1], command) for probe, command in zip(probes, commands, strict=True)]
    for probe in probes:
        probe.close()
    processes = [
        FORKSERVER.Process(target=run_commands, args=(r, folder, jobs), daemon=True) for r in range(2)
    ]
    for process in processes:
        process.start()
    return processes


def run_commands(own_rank: int, folder: Path, jobs: list[tuple[int, list[str]]]) -> None:
    with (folder / f"output{own_rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    for module, name in ((learn_groups, "learn_groups"), (finetune, "finetune")):
        setattr(module, name, keep_model(getattr(module, name), folder))
    os.environ |= {"RANK": str(own_rank), "LOCAL_RANK": str(own_rank), "WORLD_SIZE": "2"}
    for port, command in jobs:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if status := main(command):
            sys.exit(status)


def keep_model(recipe: Any, folder: Path) -> Any:
    """The recipe, which also writes the model that it returns in this process."""

    def kept(*arguments: Any, directory: Path, **more: Any) -> Any:
        result = recipe(*arguments, directory=directory, **more)
        torch.save(result.model.state_dict(), folder / f"{directory.name}.rank{rank()}.pt")
        return result

    return kept


def finish(processes: list[ForkServerProcess]) -> list[int | None]:
    for process in processes:
        process.join(200)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run(folder: Path, *commands: list[str]) -> None:
    status = finish(start(folder, *commands))
    assert status == [0, 0], [(folder / f"output{rank}.txt").read_text()[-4000:] for rank in (0, 1)]


@pytest.fixture(scope="module")
def command(image_folder: Path) -> Command:
    flags = [*COMMON, "--data-root", str(image_folder), "--save-dir"]
    return lambda stage, folder: [*STAGES[stage], *flags, str(folder)]


@pytest.fixture(scope="module")
def whole(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    run(folder, *(command(stage, folder) for stage in STAGES))
    return folder


def test_one_process_prints_and_writes_and_all_hold_the_same_model(whole: Path) -> None:
    first, second = ((whole / f"output{rank}.txt").read_text() for rank in (0, 1))
    assert first.count("test:") == first.count("weights:") == len(STAGES)
    assert not [line for line in second.splitlines() if "Warning" not in line and not line.startswith(" ")]
    assert not list(whole.rglob("*.tmp*"))
    for stage in (LEARN, FINETUNE):
        written, _ = load_weights(whole / stage / "model.pt")
        for own_rank in (0, 1):
            model = torch.load(whole / f"{stage}.rank{own_rank}.pt", weights_only=True)
            assert model.keys() == written.keys()
            assert all(torch.equal(value, written[name]) for name, value in model.items())
    masks = [value for name, value in written.items() if name.endswith(".mask")]
    assert len(masks) == 6
    assert all(0 < float(mask.mean()) < 1 for mask in masks)


@pytest.mark.parametrize(
    ("stage", "before", "torchrun"), [(LEARN, "pretrain", True), (FINETUNE, LEARN, False)]
)
def test_a_killed_process_ends_the_job_and_resuming_loses_nothing(
    stage: str, before: str, torchrun: bool, command: Command, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / before, tmp_path / before)
    if torchrun:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
        job = subprocess.Popen(
            [*launcher, "-m", "dsp_cli.main", *command(stage, tmp_path)], stderr=subprocess.PIPE, text=True
        )
        wait_for_an_epoch(tmp_path / stage)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        environments = {int(child): Path(f"/proc/{child}/environ").read_bytes() for child in children}
        (rank_1,) = (child for child, environment in environments.items() if b"\0RANK=1\0" in environment)
        os.kill(rank_1, signal.SIGKILL)
        errors = job.communicate(timeout=200)[1]
        assert job.returncode != 0
        assert "Signal 9 (SIGKILL)" in errors
    else:
        processes = start(tmp_path, command(stage, tmp_path))
        wait_for_an_epoch(tmp_path / stage)
        processes[1].kill()
        survivor, killed = finish(processes)
        assert killed == -signal.SIGKILL
        assert survivor
    assert 1 <= load_checkpoint(tmp_path / stage)["epoch"] < 8
    assert not (tmp_path / stage / "model.pt").exists()
    run(tmp_path, [*command(stage, tmp_path), "--resume"])
    with (tmp_path / stage / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == list("12345678")
    resumed, expected = (load_weights(folder / stage / "model.pt")[0] for folder in (tmp_path, whole))
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())


def wait_for_an_epoch(folder: Path) -> None:
    metrics, limit = folder / "metrics.csv", time.monotonic() + 200
    while not metrics.is_file() or len(metrics.read_text().splitlines()) < 2:
        assert time.monotonic() < limit
        time.sleep(0.002)
