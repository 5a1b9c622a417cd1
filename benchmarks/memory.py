"""Peak memory of building and running an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["PeakMemory", "peak_memory"]


@dataclass
class PeakMemory:
    """bytes: the highest memory in the block above what was held before it; None where unknown."""

    bytes: int | None = None


@contextmanager
def peak_memory(device: torch.device | str = "cpu") -> Iterator[PeakMemory]:
    """Fills in the result when the block ends.

    On a CPU it is the process's resident memory as Linux counts it: memory that the allocators kept from
    another engine hides some of it, so only ``--isolate`` gives an engine's full need.
    """
    found = PeakMemory()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int | None = torch.cuda.memory_allocated(device)
    else:
        before = _status("VmRSS") if _reset_peak() else None
    yield found
    if before is None:
        return
    after = (
        torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else _status("VmHWM")
    )
    found.bytes = max(0, after - before)


def _reset_peak() -> bool:
    """Start the kernel's high-water mark afresh (man 5 proc, clear_refs); False where that cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    return 0
