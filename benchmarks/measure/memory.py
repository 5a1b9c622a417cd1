"""Peak memory of building and running an engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["PeakMemory", "peak_memory"]


@dataclass
class PeakMemory:
    """bytes: the highest memory in the block above what was held before it; None where unknown.

    On a CPU an upper bound where the block itself lets go of files that were mapped before it.
    """

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[PeakMemory]:
    """Fills in the result when the block ends.

    On a CPU it is the process's resident memory as Linux counts it: memory that the allocators kept from
    another engine hides some of it, so only ``--isolate`` gives an engine's full need.
    """
    found = PeakMemory()
    gc.collect()  # what is garbage already would be freed inside, and hide as much of what is taken there
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        yield found
        found.bytes = max(0, torch.cuda.max_memory_allocated(device) - held)
        return
    before = _status() if _reset_peak() else None
    yield found
    if before is not None:
        now = _status()
        # A machine that needs memory takes back pages of files, such as torch's own libraries.
        taken = max(0, before["RssFile"] - now["RssFile"])
        found.bytes = max(0, now["VmHWM"] + taken - before["VmRSS"])


def _reset_peak() -> bool:
    """Start the kernel's high-water mark afresh (man 5 proc, clear_refs); False where that cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status() -> dict[str, int]:
    """Bytes of each kind of memory of this process, as Linux counts them."""
    found = dict.fromkeys(("VmHWM", "VmRSS", "RssFile"), 0)
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        field, _, value = line.partition(":")
        if field in found:
            found[field] = 1024 * int(value.split()[0])
    return found
