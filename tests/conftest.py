"""What every test shares: where the real nets are, and memory that shows when it was not written."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from dsp_pruning.released.download import find_shared

# Its watcher is a thread that lives as long as the process and may collect the garbage of any test.
tqdm.monitor_interval = 0


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real nets, data and golden numbers; skips without it unless DSP_REQUIRE_SHARED is set."""
    if golden := find_shared("golden"):
        return golden.parent
    give_up = pytest.fail if os.environ.get("DSP_REQUIRE_SHARED") else pytest.skip
    give_up("no golden numbers and images: set DSP_SHARED (`dsp download all` gets the networks only)")


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty holds NaN while a test runs, so an output that a kernel forgot to write is seen."""
    fill, deterministic = (
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.are_deterministic_algorithms_enabled(),
    )
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line on the kernels that ran as PTX, or why none did: they need nvcc."""
    reports = {
        outcome: [each for each in terminalreporter.getreports(outcome) if "cuda_ptx/" in each.nodeid]
        for outcome in ("passed", "failed", "skipped")
    }
    if run := len(reports["passed"] + reports["failed"]):
        terminalreporter.write_line(f"PTX: {run} cases, {len(reports['failed'])} failed")
    elif reports["skipped"]:
        terminalreporter.write_line(f"PTX: skipped, {reports['skipped'][0].longrepr[2]}")
