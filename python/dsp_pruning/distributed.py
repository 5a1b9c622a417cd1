"""Data-parallel training of one network: helpers over ``torch.distributed``.

Without an initialised process group every function is a no-op, or answers for a single process, so a training
loop needs no branches. Backends: gloo (CPU) and nccl (CUDA). Broadcasts, reductions, ``any_rank`` and
``barrier`` are collective: all processes call them in the same order.
"""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from dsp_kernels.errors import DSPTrainingError

_GLOO_THREAD = "pt_gloo_runloop"
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def is_distributed() -> bool:
    """Is there a process group with more than one process?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Index of this process; 0 if there is only one."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if is_distributed() else 1


def local_rank() -> int:
    """Index of this process on its machine, and of its GPU; from torchrun's environment."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_distributed() else 0


def is_main() -> bool:
    """Is this the process that prints and writes files?"""
    return rank() == 0


@contextmanager
def process_group(
    timeout_seconds: float = 600.0, *, backend: str | None = None
) -> Iterator[torch.device | None]:
    """Join the processes started by torchrun and leave them at the end; a no-op without torchrun.

    At the end of the block every process waits for the others, unless an exception ends it.

    timeout_seconds: a collective that waits longer for another process raises, so that a killed process ends
        the job. The death of a process is usually noticed at once, by its closed connection.
    backend: "nccl" or "gloo"; None uses nccl if every process of this machine has a GPU.

    Yields the device of this process, or None outside torchrun. A group that already exists is used and not
    left. Raises DSPTrainingError if torchrun's environment variables are incomplete.
    """
    if dist.is_available() and dist.is_initialized():
        yield _collective_device()
        return
    if "WORLD_SIZE" not in os.environ:
        yield None
        return
    missing = [name for name in _TORCHRUN if name not in os.environ]
    if missing:
        raise DSPTrainingError(f"WORLD_SIZE is set but {', '.join(missing)} is not; start with torchrun")
    local = int(os.environ["LOCAL_RANK"])
    if backend is None:
        # Every process of the machine must come to the same answer.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
        has_gpus = dist.is_nccl_available() and processes <= torch.cuda.device_count()
        backend = "nccl" if has_gpus else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(local)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    try:
        yield _collective_device()
        barrier()  # no process leaves while another still trains or writes
    finally:
        dist.destroy_process_group()
        _wait_for_idle_threads()


def _wait_for_idle_threads(seconds: float = 5.0) -> None:
    """Wait until gloo's threads have released the tensors of the last messages (Linux only).

    Such a thread needs the GIL to free a tensor. If it asks for it while the interpreter shuts down, Python
    ends the thread and C++ aborts the process ("terminate called without an active exception", SIGABRT)
    although its work is done. With DistributedDataParallel the threads outlive the group.
    """
    waiting, limit = 2, time.monotonic() + seconds
    while waiting and time.monotonic() < limit:
        time.sleep(0.005)  # releases the GIL for a thread that waits for it
        waiting = waiting - 1 if all(state == "S" for state in _thread_states(_GLOO_THREAD)) else 2


def _thread_states(name: str) -> list[str]:
    """The kernel's one-letter state of every thread of this name; S means sleeping."""
    states = []
    for path in Path("/proc/self/task").glob("*/stat"):
        with suppress(OSError):  # the thread may have ended
            before, _, after = path.read_text().rpartition(")")
            if before.partition("(")[2] == name:
                states.append(after.split()[0])
    return states


def broadcast_tensors(tensors: Sequence[Tensor], source: int = 0) -> None:
    """Replace tensors by those of ``source``, in place. Shapes and dtypes are the same on all processes."""
    _in_messages(tensors, lambda flat: dist.broadcast(flat, source))


def all_reduce_mean(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its mean over the processes, in place; all get the same bits."""

    def mean(flat: Tensor) -> None:
        dist.all_reduce(flat)
        flat.div_(world_size())

    _in_messages(tensors, mean)


def all_reduce_max(tensor: Tensor) -> None:
    """Replace a tensor by its maximum over the processes, in place; on a GPU the host does not wait."""
    _in_messages([tensor], lambda flat: dist.all_reduce(flat, dist.ReduceOp.MAX))


def any_rank(flag: bool) -> bool:
    """Is the flag set on any process? The host waits for the answer."""
    value = torch.tensor(float(flag))
    all_reduce_max(value)
    return bool(value)


def barrier() -> None:
    """Wait until every process is here."""
    any_rank(False)  # not dist.barrier(), because nccl's guesses the device


def unwrap(model: nn.Module) -> nn.Module:
    """The network inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)  # torch.compile
        if isinstance(model, DistributedDataParallel | DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _collective_device() -> torch.device:
    """Where this group's backend needs its tensors."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@torch.no_grad()
def _in_messages(tensors: Sequence[Tensor], collective: Callable[[Tensor], Any]) -> None:
    """Apply an in-place collective to all tensors, in one message per dtype and device."""
    if not is_distributed():
        return
    device = _collective_device()
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for parts in kinds.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in parts])
        if flat.device.type != device.type:
            flat = flat.to(device)
        collective(flat)
        pieces = flat.split([tensor.numel() for tensor in parts])
        for tensor, piece in zip(parts, pieces, strict=True):
            tensor.copy_(piece.view(tensor.shape))
