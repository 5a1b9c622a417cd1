"""Small helpers on ``torch.distributed``: several processes that train one network.

Every function does nothing, or answers for a single process, where no process group is initialised. So a
training loop needs no branches. They work with the backends gloo (CPU) and nccl (CUDA). All processes have
to call the collective ones (broadcast, mean, maximum, any_rank, barrier), in the same order.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dsp_kernels.errors import DSPTrainingError

__all__ = [
    "all_reduce_max",
    "all_reduce_mean",
    "any_rank",
    "barrier",
    "broadcast_object",
    "broadcast_tensors",
    "is_distributed",
    "is_main",
    "local_rank",
    "process_group",
    "rank",
    "unwrap",
    "world_size",
]

T = TypeVar("T")
_GLOO_THREAD = "pt_gloo_runloop"
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_distributed() -> bool:
    """Is there a process group with more than one process?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process, 0 where there is only one."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """Number of this process on its machine, which is that of its GPU; from torchrun's environment."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_distributed() else 0


def is_main() -> bool:
    """Is this the process that prints and writes files?"""
    return rank() == 0


@contextmanager
def process_group(
    timeout_seconds: float = 600.0, *, backend: str | None = None, init_method: str = "env://"
) -> Iterator[torch.device | None]:
    """Join the processes that torchrun started, and leave them at the end; without torchrun, nothing.

    At the end of the block every process waits for the others, unless an exception ends it.

    timeout_seconds: a collective that waits longer than this for another process raises, so that a killed
        process ends the job. A process that dies is mostly noticed at once, by its closed connection.
    backend: "nccl" or "gloo"; None takes nccl where there is a GPU for every process of this machine.

    Yields the device of this process, or None outside torchrun. A group that is initialised already is
    used as it is, and is not left.

    Raises DSPTrainingError where the environment names a group but not all that joining it needs.
    """
    if dist.is_available() and dist.is_initialized():
        yield _collective_device()
        return
    if "WORLD_SIZE" not in os.environ:
        yield None
        return
    missing = [name for name in _TORCHRUN if name not in os.environ]
    if missing and init_method == "env://":
        raise DSPTrainingError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start with torchrun")
    index, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    if backend is None:
        on_gpu = dist.is_nccl_available() and local < torch.cuda.device_count()
        backend = "nccl" if on_gpu else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(local)
    dist.init_process_group(
        backend,
        init_method,
        timeout=timedelta(seconds=timeout_seconds),
        world_size=int(os.environ["WORLD_SIZE"]),
        rank=index,
    )
    try:
        yield _collective_device()
        barrier()  # nobody leaves while another still trains or writes
    finally:
        dist.destroy_process_group()
        _wait_for_idle_threads()


def _wait_for_idle_threads(seconds: float = 5.0) -> None:
    """Wait until gloo's threads have let go of the tensors of the last messages; on Linux alone.

    Such a thread needs the interpreter to free a tensor. If it asks while the interpreter shuts down, Python
    ends the thread, which C++ answers with "terminate called without an active exception" and SIGABRT, in a
    process that had done all its work. Where DistributedDataParallel was used the threads outlive the group.
    """
    waiting, limit = 2, time.monotonic() + seconds
    while waiting and time.monotonic() < limit:
        time.sleep(0.005)  # a thread that waits for the interpreter gets it now
        waiting = waiting - 1 if all(state == "S" for state in _states(_GLOO_THREAD)) else 2


def _states(name: str) -> list[str]:
    """The kernel's one-letter state of every thread of this name, S for one that sleeps."""
    states = []
    for path in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # a thread may end meanwhile
            before, _, after = path.read_text().rpartition(")")
            if before.partition("(")[2] == name:
                states.append(after.split()[0])
    return states


def broadcast_object(value: T, source: int = 0) -> T:
    """What process ``source`` gave; it is pickled on the way."""
    if not is_distributed():
        return value
    holder = [value]
    dist.broadcast_object_list(holder, source, device=_collective_device())
    return holder[0]


@torch.no_grad()
def broadcast_tensors(tensors: Sequence[Tensor], source: int = 0) -> None:
    """Give every process the values of ``source``, in place. Shapes and dtypes are the same on all."""
    if is_distributed():
        for parts in _by_kind(tensors):
            flat = _to_collective(_flatten(parts))
            dist.broadcast(flat, source)
            _scatter_back(parts, flat)


@torch.no_grad()
def all_reduce_mean(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in place, in one message per dtype and device.

    All processes end with the same bits.
    """
    if is_distributed():
        for parts in _by_kind(tensors):
            flat = _to_collective(_flatten(parts))
            dist.all_reduce(flat)
            _scatter_back(parts, flat.div_(world_size()))


@torch.no_grad()
def all_reduce_max(tensor: Tensor) -> None:
    """Replace a tensor by its largest value over the processes, in place; on a GPU the host does not wait."""
    if is_distributed():
        moved = _to_collective(tensor)
        dist.all_reduce(moved, dist.ReduceOp.MAX)
        tensor.copy_(moved)


def any_rank(flag: bool) -> bool:
    """Does any process say so? The host waits for the answer."""
    if not is_distributed():
        return flag
    value = torch.tensor(float(flag), device=_collective_device())
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def barrier() -> None:
    """Wait until every process is here."""
    if is_distributed():
        # An all-reduce by hand: nccl's own barrier guesses the device.
        any_rank(False)


def unwrap(model: nn.Module) -> nn.Module:
    """The network itself, without DistributedDataParallel, DataParallel or torch.compile around it."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if isinstance(model, DistributedDataParallel | DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _collective_device() -> torch.device:
    """Where a tensor must be for this group's messages."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _to_collective(tensor: Tensor) -> Tensor:
    device = _collective_device()
    return tensor if tensor.device.type == device.type else tensor.to(device)


def _by_kind(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(kinds.values())


def _flatten(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _scatter_back(tensors: Sequence[Tensor], flat: Tensor) -> None:
    pieces = flat.split([tensor.numel() for tensor in tensors])
    for tensor, piece in zip(tensors, pieces, strict=True):
        tensor.copy_(piece.view(tensor.shape))
