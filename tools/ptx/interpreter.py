"""The CUDA ops on tensors in host memory: every launch runs the PTX in the interpreter and is checked."""

import ctypes
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
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
        named = list(zip(func._schema.arguments, args, strict=True))
        inputs, outputs = (
            {a.name: value for a, value in named if isinstance(value, Tensor) and _is_written(a) == writes}
            for writes in (False, True)
        )
        with self.checked(inputs, outputs):
            func(*args)

    def launch(
        self, module: str, blocks: int, threads: int, shared_bytes: int, arguments: Sequence[Tensor | int]
    ) -> None:
        """Runs the only kernel of a PTX module, whose integer parameters have 32 bits."""
        values = [
            ctypes.c_uint64(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_int32(a) for a in arguments
        ]
        values += [ctypes.c_uint64(0)] * (module.count("\t.param ") - len(values))  # no scratch memory
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        load(self._library, module)
        name = re.search(r"\.entry (\w+)", module)
        assert name
        status = self._library.ptx_launch(name[1].encode(), blocks, threads, shared_bytes, pointers)
        if status:
            raise PTXError(f"the launch of {name[1]} was refused with CUDA error {status}")

    @contextmanager
    def checked(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Iterator[None]:
        """Checks the launches inside, which may use no other memory; a tensor may be in both."""
        library = self._library
        library.ptx_begin(*self._options)
        names: dict[tuple[int, int], list[str]] = defaultdict(list)
        for name, tensor in (*inputs.items(), *outputs.items()):
            names[tensor.data_ptr(), tensor.nbytes].append(name)
        for (start, size), same in names.items():
            reads, writes = (any(name in kind for name in same) for kind in (inputs, outputs))
            library.ptx_region(start, size, reads, writes, " and ".join(same).encode())
        yield
        self.launches += library.ptx_launches().decode().split()
        if errors := library.ptx_errors().decode():
            raise PTXError(errors)


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


@cache
def loaded() -> ctypes.CDLL:
    """The interpreter with its ops registered in torch and the PTX of every kernel loaded."""
    folder = build()
    torch.ops.load_library(str(folder / LIBRARY))
    library = ctypes.CDLL(str(folder / LIBRARY))
    for name in ("ptx_load", "ptx_errors", "ptx_launches"):
        getattr(library, name).restype = ctypes.c_char_p
    library.ptx_begin.argtypes = [ctypes.c_char_p, *[ctypes.c_int] * 5, ctypes.c_uint64, ctypes.c_int]
    library.ptx_launch.argtypes = [ctypes.c_char_p, *[ctypes.c_uint32] * 2, ctypes.c_uint64, ctypes.c_void_p]
    library.ptx_region.argtypes = [*[ctypes.c_uint64] * 2, *[ctypes.c_int] * 2, ctypes.c_char_p]
    for path in sorted(folder.glob("*.ptx")):
        load(library, path.read_text())
    return library


def load(library: ctypes.CDLL, module: str) -> None:
    """Loads PTX text; its kernels replace those of the same chip and name. Raises PTXError."""
    if error := library.ptx_load(module.encode()).decode():
        raise PTXError(error)
