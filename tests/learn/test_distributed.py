"""Data-parallel learning: the helpers alone, and two real processes against one with the doubled batch."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dsp_kernels.errors import DSPTrainingError
from dsp_pruning import distributed
from dsp_pruning.learn.penalty import hard_assignment

SCRIPT = Path(__file__).resolve().parents[1] / "helpers" / "distributed_learner.py"
MODES = ["none", "exact"]


def test_helpers_do_nothing_in_a_single_process() -> None:
    value = torch.tensor([1.0, 2.0])
    with distributed.process_group() as device:
        assert device is None
        distributed.broadcast_tensors([value])
        distributed.all_reduce_mean([value])
        distributed.all_reduce_max(value)
        distributed.barrier()
        assert (distributed.any_rank(True), distributed.any_rank(False)) == (True, False)
    assert value.tolist() == [1.0, 2.0]
    assert (distributed.rank(), distributed.world_size(), distributed.local_rank()) == (0, 1, 0)
    assert distributed.is_main()


def test_incomplete_environment_variables_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(DSPTrainingError, match=r"MASTER_ADDR.*torchrun"), distributed.process_group():
        pass


@pytest.mark.parametrize(("gpus", "backend"), [(1, "gloo"), (2, "nccl")])
def test_ranks_of_one_machine_choose_the_same_backend(
    gpus: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks on one GPU: rank 0 alone would have one."""
    chosen: list[str] = []

    def join(backend: str, **_: Any) -> None:
        chosen.append(backend)
        raise InterruptedError

    torchrun = {"LOCAL_RANK": "0", "RANK": "0", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}
    for name, value in (torchrun | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "init_process_group", join)
    with pytest.raises(InterruptedError), distributed.process_group():
        pass
    assert chosen == [backend]


def test_unwrap_finds_the_network() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert distributed.unwrap(model) is model
    assert distributed.unwrap(torch.compile(nn.DataParallel(model))) is model


def start(world: int, *arguments: str | Path) -> list[subprocess.Popen[str]]:
    """The script once per rank, with torchrun's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = os.environ | {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, arguments)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """Exit status and output of each; one that is not done in time is killed and fails the test."""
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process found ("1-0"), and each of two ("2-0", "2-1")."""
    folder = tmp_path_factory.mktemp("learning")
    pair = start(2, "learn", folder)
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    command = [sys.executable, str(SCRIPT), "learn", str(folder)]
    subprocess.run(command, check=True, env=environment | {"OMP_NUM_THREADS": "1"}, timeout=100)
    for status, output in finish(pair):  # 0 also means that leaving the group did not abort the process
        assert status == 0, output[-4000:]
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")}


@pytest.mark.parametrize("rank", [0, 1])
def test_helpers_of_two_processes(runs: dict[str, Any], rank: int) -> None:
    found = runs[f"2-{rank}"]["helpers"]
    assert found["world"] == (2, rank, rank, rank == 0)
    assert all((tensor == 1).all() for tensor in found["broadcast from 1"])
    assert [value.tolist() for value in found["mean"]] == [[0.5, 1.5, 2.5], 5.0]
    assert found["max"].item() == 1
    assert found["any"] == (True, False)
    assert found["unwrapped"]


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
    trained = [name for name in first if "running" not in name]  # DDP does not synchronise those
    assert any(name.endswith("group") for name in trained)
    assert all(torch.equal(first[name], second[name]) for name in trained)


@pytest.mark.parametrize("mode", MODES)
def test_an_overflow_of_one_process_holds_back_all(runs: dict[str, Any], mode: str) -> None:
    for name in ("2-0", "2-1"):
        assert runs[name][f"overflow/{mode}"] == {"held": True, "skipped": 1}


def test_a_killed_process_ends_the_other_with_an_error(tmp_path: Path) -> None:
    processes = start(2, "die", tmp_path)
    survivor, killed = finish(processes)  # the group's own timeout is 20 s
    assert killed[0] == -9
    assert survivor[0] > 0, survivor[1][-4000:]
    assert "Error" in survivor[1], survivor[1][-4000:]
