"""Start a script as several processes of one gloo group, and wait for them with a bound."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def start(script: str, world: int, *arguments: str | Path) -> list[subprocess.Popen[str]]:
    """``script`` (a file beside this one) once per rank, with torchrun's environment."""
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
            [sys.executable, str(HERE / script), *map(str, arguments)],
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]


def finish(processes: list[subprocess.Popen[str]], seconds: float = 100.0) -> list[tuple[int, str]]:
    """Exit status and output of each; one that is not done in time is killed and fails the test."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [(process.returncode, output) for process, output in zip(processes, outputs, strict=True)]


def tail(output: str, lines: int = 60) -> str:
    """The end of what a process printed, to be shown where it failed."""
    return "\n".join(output.splitlines()[-lines:])
