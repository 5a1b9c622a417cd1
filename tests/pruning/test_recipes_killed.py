"""A training run may be killed at any moment, alone or as one of two processes, and loses nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from dsp_pruning.recipes.checkpoint import LAST, load_checkpoint

ROOT = Path(__file__).resolve().parents[2]

# Each process trains on its half of every batch; process 1 kills itself in the second epoch if told to.
RECIPE = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
from dsp_pruning.data import load_digits
from dsp_pruning.distributed import process_group, rank
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain

torch.set_num_threads(1)
folder, mode = Path(sys.argv[1]), sys.argv[2]
digits = load_digits(size=8)
data = replace(digits, train=digits.train[torch.arange(64)])

def progress(done, total, text):
    if mode == "die" and rank() == 1 and done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

config = PretrainConfig(depth=8, epochs=2, batch_size=32, device="cpu")
with process_group(60):
    result = pretrain(data, config, folder, resume=mode == "resume", progress=progress)
    torch.save(dict(result.model.state_dict()), folder / f"rank{rank()}.pt")
    if result.main:
        print("main", result.test.n)
"""


def _torchrun(script: Path, folder: Path, mode: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(script), str(folder), mode],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_two_processes_train_one_network_and_a_killed_one_ends_the_job(tmp_path: Path) -> None:
    script = tmp_path / "recipe.py"
    script.write_text(RECIPE)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = _torchrun(script, whole, "run")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("main") == 1
    first, second = (torch.load(whole / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    started = time.perf_counter()
    assert _torchrun(script, broken, "die").returncode != 0
    assert time.perf_counter() - started < 120
    assert load_checkpoint(broken)["epoch"] == 1
    assert _torchrun(script, broken, "resume").returncode == 0
    again = torch.load(broken / "rank1.pt", weights_only=True)
    assert all(torch.equal(again[name], value) for name, value in first.items())
    assert (broken / LAST).is_file()


def test_a_run_that_is_killed_twice_ends_as_one_left_alone() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "kill_test.py"), "--kills", "2", "--epochs", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stages that differ: none" in done.stdout
