"""A launch of a block kernel, run on the host by tests/cuda/emulator with the op's tables and sizes."""

from __future__ import annotations

import ctypes
from pathlib import Path

from emulation import NUMBER, Counts
from torch import Tensor


class BlockEmulator:
    """Callable like the op. late, backwards: see host_machine.h; counts: of the latest of all launches."""

    def __init__(self, library: Path) -> None:
        self._run = ctypes.CDLL(str(library)).dsp_emulate_block
        self._run.restype = ctypes.c_char_p
        self.late = self.backwards = False
        self.counts = Counts()
        self.launches = 0

    def __call__(
        self,
        x: Tensor,
        out: Tensor,
        residual: Tensor | None,
        weights: Tensor,
        bias: Tensor,
        tables: Tensor,
        sizes: list[int],
    ) -> None:
        tensors = (x, out, residual, weights, bias, tables)
        counts = (ctypes.c_int64 * 8)()
        error = self._run(
            NUMBER[x.dtype],
            *(ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in tensors),
            (ctypes.c_int64 * len(sizes))(*sizes),
            ctypes.c_int64(len(sizes)),
            (ctypes.c_int64 * 6)(*(0 if t is None else t.numel() * t.element_size() for t in tensors)),
            int(self.late),
            int(self.backwards),
            counts,
        )
        if error is not None:
            raise RuntimeError(error.decode())
        self.counts = Counts(*counts)
        self.launches += 1
