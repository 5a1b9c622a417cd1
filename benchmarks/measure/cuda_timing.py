"""Times of one call on a GPU: device time with a warm and a cold L2 cache, and the time to enqueue."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dsp_kernels.errors import DSPBackendError

_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any current GPU
# Clock cycles that the device is kept busy while Python enqueues the timed call: 1 ms at 2 GHz.
_HEAD_START = 2_000_000


@dataclass(frozen=True)
class DeviceTimes:
    """Seconds of one call, each a median.

    warm, cold: between two events on the device, with the L2 cache as the previous call left it, and flushed.
    enqueue: until the call returned to Python.
    """

    warm: float
    cold: float
    enqueue: float


def device_times(call: Callable[[], object], repeats: int = 50) -> DeviceTimes:
    """Time ``call`` with events on the current CUDA stream.

    The device is kept busy while Python enqueues the first event and the call, so that it does not wait for
    Python between the two events. Only a call that takes longer to enqueue than that includes Python's time.
    Raises DSPBackendError without a CUDA device.
    """
    if not torch.cuda.is_available():
        raise DSPBackendError("device times need a CUDA device, and torch finds none")
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    warm = _between_events(call, repeats, lambda: None)
    cold = _between_events(call, repeats, flush.zero_)
    return DeviceTimes(warm, cold, _enqueue(call, repeats))


def _enqueue(call: Callable[[], object], repeats: int) -> float:
    taken = []
    for _ in range(repeats):
        # On an idle device: otherwise a full queue would count as enqueue time.
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        taken.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return statistics.median(taken)


def _between_events(call: Callable[[], object], repeats: int, before: Callable[[], object]) -> float:
    pairs = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before()
        torch.cuda._sleep(_HEAD_START)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        pairs.append((start, end))
    return 1e-3 * statistics.median(start.elapsed_time(end) for start, end in pairs)
