"""``dsp`` commands in two processes of one gloo group, forked from a server that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from dsp_cli.main import main
from dsp_pruning.distributed import rank
from dsp_pruning.recipes import finetune, learn_groups

__all__ = ["finish", "run_commands", "start"]

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["dsp_cli.app"])


def start(folder: Path, *commands: list[str]) -> list[ForkServerProcess]:
    """Run the commands one after the other in two ranks; output goes to ``folder/output<rank>.txt``."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in commands]
    jobs = [(probe.getsockname()[1], command) for probe, command in zip(probes, commands, strict=True)]
    for probe in probes:
        probe.close()
    processes = [FORKSERVER.Process(target=run_commands, args=(r, folder, jobs)) for r in range(2)]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[ForkServerProcess], seconds: float = 200.0) -> list[int | None]:
    """Exit codes. A process that takes longer is killed."""
    for process in processes:
        process.join(seconds)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def run_commands(own_rank: int, folder: Path, jobs: list[tuple[int, list[str]]]) -> None:
    """One rank. The model that each recipe returns goes to ``folder/<stage>.rank<rank>.pt``."""
    with (folder / f"output{own_rank}.txt").open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    torch.set_num_threads(1)
    finetune.finetune, learn_groups.learn_groups = (  # type: ignore[assignment]
        _keep_model(recipe, folder) for recipe in (finetune.finetune, learn_groups.learn_groups)
    )
    os.environ |= {"RANK": str(own_rank), "LOCAL_RANK": str(own_rank), "WORLD_SIZE": "2"}
    for port, command in jobs:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        status = main(command)
        if status:
            sys.exit(status)


def _keep_model(recipe: Any, folder: Path) -> Any:
    def kept(*arguments: Any, directory: Path, **more: Any) -> Any:
        result = recipe(*arguments, directory=directory, **more)
        torch.save(result.model.state_dict(), folder / f"{directory.name}.rank{rank()}.pt")
        return result

    return kept
