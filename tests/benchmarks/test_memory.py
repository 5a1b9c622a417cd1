"""Peak memory: of what a block takes, whatever else comes and goes meanwhile."""

from __future__ import annotations

import gc
import mmap
from pathlib import Path

from dsp_benchmarks.measure.memory import peak_memory


def pages(megabytes: int) -> mmap.mmap:
    """Memory of its own: what an allocator kept of an earlier block would be no new memory."""
    block = mmap.mmap(-1, megabytes << 20)
    for at in range(0, len(block), mmap.PAGESIZE):
        block[at] = 1
    return block


def test_peak_memory_sees_an_allocation_that_is_gone_again() -> None:
    with peak_memory() as memory:
        block = pages(128)
        del block
    assert memory.bytes is None or 120 << 20 <= memory.bytes <= 200 << 20


class _Circle:
    """Holds memory until the garbage collector comes."""

    def __init__(self) -> None:
        self.block = pages(160)
        self.own = self


def test_garbage_of_what_ran_before_hides_nothing() -> None:
    gc.disable()  # until it is inside
    try:
        _Circle()
        with peak_memory() as memory:
            gc.collect()
            block = pages(128)
            del block
    finally:
        gc.enable()
    assert memory.bytes is None or 120 << 20 <= memory.bytes <= 200 << 20


def test_pages_of_files_that_the_machine_takes_back_hide_nothing(tmp_path: Path) -> None:
    path = tmp_path / "library"
    path.write_bytes(b"x" * (96 << 20))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        assert library[:: mmap.PAGESIZE].count(b"x") == (96 << 20) // mmap.PAGESIZE  # all of them are here
        with peak_memory() as memory:
            library.madvise(mmap.MADV_DONTNEED)
            block = pages(128)
            del block
    assert memory.bytes is None or 120 << 20 <= memory.bytes <= 200 << 20
