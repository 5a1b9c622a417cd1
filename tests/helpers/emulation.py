"""A launch of a CUDA kernel in tests/cuda_emulated/emulator, with the tables and sizes of the op."""

import ctypes
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

NUMBER = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
# Shared memory of a thread block: sm_90, and sm_86, the least that the kernels run with.
MOST_SHARED, LEAST_SHARED = 232448, 101376


@dataclass
class Counts:
    """Accesses of shared memory (of 16 bytes: per quarter warp), and bank conflicts."""

    matrices: int = 0
    matrix_conflicts: int = 0
    copies: int = 0
    copy_conflicts: int = 0
    stores: int = 0
    store_conflicts: int = 0
    loads: int = 0
    load_conflicts: int = 0


class Arguments(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_int64),
        ("tensors", ctypes.c_void_p * 6),
        ("bytes", ctypes.c_int64 * 6),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("size_count", ctypes.c_int64),
        ("late", ctypes.c_int64),
        ("backwards", ctypes.c_int64),
        ("shared_limit", ctypes.c_int64),
        ("counts", ctypes.c_int64 * len(astuple(Counts()))),
    )


class Emulator:
    """Callable like the op of this name. late, backwards: see host_machine.h.

    counts: of the latest launch. launches: the first of the op's sizes, of every launch.
    """

    def __init__(self, library: Path, op: str) -> None:
        self._run = getattr(ctypes.CDLL(str(library)), op)
        self._run.restype = ctypes.c_char_p
        self.late = self.backwards = False
        self.shared_limit = MOST_SHARED
        self.counts = Counts()
        self.launches: list[int] = []

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
        arguments = Arguments(
            NUMBER[x.dtype],
            tuple(0 if t is None else t.data_ptr() for t in tensors),
            tuple(0 if t is None else t.numel() * t.element_size() for t in tensors),
            (ctypes.c_int64 * len(sizes))(*sizes),
            len(sizes),
            self.late,
            self.backwards,
            self.shared_limit,
        )
        error = self._run(ctypes.byref(arguments))
        if error is not None:
            raise RuntimeError(error.decode())
        self.counts = Counts(*arguments.counts)
        self.launches.append(sizes[0])
