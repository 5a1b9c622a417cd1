"""Times of one call on a GPU: device time with a warm and a cold L2 cache, and the time to enqueue."""

import statistics
import time
from collections.abc import Callable

import torch

_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any current GPU
# Clock cycles that the device is kept busy while Python enqueues the timed call: 1 ms at 2 GHz.
_HEAD_START = 2_000_000


def device_times(call: Callable[[], object], repeats: int = 50) -> tuple[float, float, float]:
    """Median seconds of ``call``: on the device with a warm L2 cache, with a flushed one, and to enqueue it.

    Device times are between two events. The device is kept busy while Python enqueues the first event and the
    call, so that it does not wait for Python between them unless enqueueing takes longer than that.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def between_events(before: Callable[[], object]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        before()
        torch.cuda._sleep(_HEAD_START)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def enqueue() -> float:
        torch.cuda.synchronize()  # a full queue would count as enqueue time
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    def median(sample: Callable[[], float]) -> float:
        return statistics.median(sample() for _ in range(repeats))

    warm = median(lambda: between_events(lambda: None))
    cold = median(lambda: between_events(flush.zero_))
    return warm, cold, median(enqueue)
