"""Two real processes that learn one network's groups, against one process with the doubled batch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_helpers import HERE, finish, start, tail

from dsp_pruning.learn.penalty import hard_assignment

MODES = ["none", "exact"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process found, and what each of two did."""
    folder = tmp_path_factory.mktemp("learning")
    script = "distributed_learner.py"
    pair = start(script, 2, "learn", folder)
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    command = [sys.executable, str(HERE / script), "learn", str(folder)]
    subprocess.run(command, check=True, env=environment | {"OMP_NUM_THREADS": "1"}, timeout=100)
    for status, output in finish(pair):
        assert status == 0, tail(output)
    names = ("1-0", "2-0", "2-1")
    return {name: torch.load(Path(folder) / f"{name}.pt", weights_only=True) for name in names}


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_equal_one_with_the_doubled_batch(runs: dict[str, Any], mode: str) -> None:
    alone, together = runs["1-0"][f"plain/{mode}"], runs["2-0"][f"plain/{mode}"]
    assert alone.keys() == together.keys()
    for name, value in alone.items():
        # Sums of 8 images in another order, through three steps; Adam magnifies what reaches the logits.
        assert float((value - together[name]).abs().max()) <= (1e-10 if "group" in name else 1e-12), name
        if "group" in name:
            assert torch.equal(hard_assignment(value), hard_assignment(together[name]))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("network", ["plain", "norm"])
def test_all_processes_hold_the_same_bits(runs: dict[str, Any], network: str, mode: str) -> None:
    first, second = runs["2-0"][f"{network}/{mode}"], runs["2-1"][f"{network}/{mode}"]
    trained = [name for name in first if "running" not in name]  # DDP leaves those to each process
    assert any(name.endswith("group") for name in trained)
    assert all(torch.equal(first[name], second[name]) for name in trained)


@pytest.mark.parametrize("mode", MODES)
def test_an_overflow_of_one_process_holds_back_all(runs: dict[str, Any], mode: str) -> None:
    for name in ("2-0", "2-1"):
        assert runs[name][f"overflow/{mode}"] == {"held": True, "skipped": 1}


def test_a_killed_process_ends_the_other_with_an_error(tmp_path: Path) -> None:
    processes = start("distributed_learner.py", 2, "die", tmp_path)
    try:
        processes[1].wait(100)
    finally:
        began = time.monotonic()
        survivor, killed = finish(processes, 45.0)
    assert killed[0] == -9
    assert survivor[0] > 0, tail(survivor[1])
    assert "Error" in survivor[1], tail(survivor[1])
    assert time.monotonic() - began < 40  # the group's own bound is 20 s
