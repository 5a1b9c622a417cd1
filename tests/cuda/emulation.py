"""A launch of a CUDA kernel, run on the host by tests/cuda/emulator with the op's tables and sizes."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NUMBER = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
# Of one block: sm_90, and sm_86 as the smallest that the kernels run on.
MOST_SHARED, LEAST_SHARED = 232448, 101376


@dataclass
class Counts:
    """Accesses of shared memory as the hardware takes them (16 bytes: quarter warps), and extra turns."""

    matrices: int = 0
    matrix_conflicts: int = 0
    copies: int = 0
    copy_conflicts: int = 0
    stores: int = 0
    store_conflicts: int = 0
    loads: int = 0
    load_conflicts: int = 0


class Emulator:
    """Callable like the op. late, backwards: see host_machine.h; counts: of the latest launch."""

    def __init__(self, library: Path) -> None:
        self._run = ctypes.CDLL(str(library)).dsp_emulate
        self._run.restype = ctypes.c_char_p
        self.late = self.backwards = False
        self.shared_limit = MOST_SHARED
        self.counts = Counts()
        self.kernels: list[int] = []

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
        pointers = [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in tensors]
        bytes_ = [0 if t is None else t.numel() * t.element_size() for t in tensors]
        counts = (ctypes.c_int64 * 8)()
        error = self._run(
            NUMBER[x.dtype],
            *pointers,
            (ctypes.c_int64 * len(sizes))(*sizes),
            (ctypes.c_int64 * 6)(*bytes_),
            int(self.late),
            int(self.backwards),
            ctypes.c_int64(self.shared_limit),
            counts,
        )
        if error is not None:
            raise RuntimeError(error.decode())
        self.kernels.append(sizes[0])
        self.counts = Counts(*counts)
