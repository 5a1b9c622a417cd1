"""The CUDA ops on tensors in host memory: every launch runs the PTX in the interpreter and is checked."""

import ctypes
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ptx.build import LIBRARY, build

# The most bytes of shared memory of a thread block.
SHARED_BYTES = {"sm_80": 166_912, "sm_86": 101_376, "sm_90a": 232_448}


class PTXError(Exception):
    """What a kernel did wrong, as the interpreter reports it."""


class Interpreter(TorchDispatchMode):
    """While entered, torch.ops.dsp_kernels.cuda_conv and cuda_block take tensors on the CPU.

    The op's schema says which tensors a kernel may only read; the others it must write, every byte once. A
    launch that does not, or that breaks another rule of README.md, raises PTXError.

    target: the chip. order: of the warps: 0 forwards, 1 backwards, 2 in random pieces. copies, wgmma: when
    asynchronous copies and products happen: 0 as late as allowed, 1 at once, 2 either. lanes: of a diverged
    warp: 0 lowest address first, 1 at random. backwards: thread blocks too. shared_limit: bytes of a block.
    """

    ORDERS: ClassVar[dict[str, dict[str, int]]] = {
        "late": {},
        "early-backwards": {"order": 1, "copies": 1, "wgmma": 1, "backwards": 1},
        "random": {"order": 2, "copies": 2, "wgmma": 2, "lanes": 1},
    }

    def __init__(
        self,
        target: str = "sm_90a",
        *,
        order: int = 0,
        copies: int = 0,
        wgmma: int = 0,
        lanes: int = 0,
        backwards: int = 0,
        seed: int = 1,
        shared_limit: int | None = None,
    ) -> None:
        super().__init__()
        self._library = loaded()
        self.launches: list[str] = []  # names of kernels in the PTX
        limit = shared_limit or SHARED_BYTES[target]
        self._options = target.encode(), order, copies, wgmma, lanes, backwards, seed, limit

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (torch.ops.dsp_kernels.cuda_conv.default, torch.ops.dsp_kernels.cuda_block.default):
            return func(*args, **(kwargs or {}))
        with self.checked(zip(func._schema.arguments, args, strict=True)):
            func(*args)

    @contextmanager
    def checked(self, arguments: Iterable[tuple[Any, Any]]) -> Iterator[None]:
        """Checks the launches inside. arguments: those of an op's schema with their values."""
        library = self._library
        library.ptx_begin(*self._options)
        regions: dict[int, list[Any]] = {}
        for argument, value in arguments:
            if isinstance(value, Tensor):
                region = regions.setdefault(value.data_ptr(), [value.nbytes, False, False, []])
                writes = argument.alias_info is not None and argument.alias_info.is_write
                region[1] |= not writes
                region[2] |= writes
                region[3].append(argument.name)
        for start, (size, reads, writes, names) in regions.items():
            library.ptx_region(start, size, reads, writes, " and ".join(names).encode())
        yield
        self.launches += library.ptx_launches().decode().split()
        if errors := library.ptx_errors().decode():
            raise PTXError(errors)


@cache
def loaded() -> ctypes.CDLL:
    """The interpreter with its ops registered in torch and the PTX of every kernel loaded."""
    folder = build()
    torch.ops.load_library(str(folder / LIBRARY))
    library = ctypes.CDLL(str(folder / LIBRARY))
    for name in ("ptx_load", "ptx_errors", "ptx_launches"):
        getattr(library, name).restype = ctypes.c_char_p
    library.ptx_begin.argtypes = [ctypes.c_char_p, *[ctypes.c_int] * 5, ctypes.c_uint64, ctypes.c_int]
    library.ptx_region.argtypes = [*[ctypes.c_uint64] * 2, *[ctypes.c_int] * 2, ctypes.c_char_p]
    for path in sorted(folder.glob("*.ptx")):
        load(library, path.read_text())
    return library


def load(library: ctypes.CDLL, module: str) -> None:
    """Loads PTX text; its kernels replace those of the same chip and name. Raises PTXError."""
    if error := library.ptx_load(module.encode()).decode():
        raise PTXError(error)
