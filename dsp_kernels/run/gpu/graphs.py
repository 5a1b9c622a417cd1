"""CUDA graphs: launches on fixed buffers are captured once and replayed as one launch."""

import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

# Capturing changes state of the process: the generator's and the allocator's. Reentrant: a launch that is to
# be captured may run another network for the first time.
_one_capture = threading.RLock()


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream of this device is being captured into a CUDA graph."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def capture(launch: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None] | None:
    """The launches of ``launch`` as one replay on the current stream, or None if they cannot be captured.

    ``launch`` works on fixed buffers and runs twice first. pool: of ``torch.cuda.graph_pool_handle``; graphs
    that share one must not be replayed concurrently. An operation that synchronises, as a user's own module
    may, cannot be captured: that is warned of, and the stream and the generator are as before.
    """
    pool = pool or torch.cuda.graph_pool_handle()
    with _one_capture, torch.cuda.device(device):
        caller = torch.cuda.current_stream(device)
        side = torch.cuda.Stream(device)
        side.wait_stream(caller)
        graph = torch.cuda.CUDAGraph()
        failure = None
        with torch.cuda.stream(side):
            launch()  # compiles kernels and initialises libraries
            launch()  # shows that it worked
            # Not torch.cuda.graph: it waits for the device and empties the allocator's cache at every
            # capture, and a failed one leaves the side stream as the current one. Other threads may allocate
            # meanwhile.
            graph.capture_begin(pool, capture_error_mode="thread_local")
            try:
                launch()
                graph.capture_end()
            except BaseException as error:
                _abandon(graph, pool)
                if not isinstance(error, RuntimeError):
                    raise
                failure = error
        caller.wait_stream(side)
    if failure is None:
        return graph.replay
    warnings.warn(
        f"this network cannot be captured in a CUDA graph; its steps are launched one by one ({failure})",
        stacklevel=2,
    )
    return None


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a capture that failed; if that fails too, generator and allocator would remain capturing."""
    try:
        graph.capture_end()
    except RuntimeError:
        index = torch.cuda.current_device()
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
        with suppress(RuntimeError):  # capture_end may have done it before it raised
            torch._C._cuda_endAllocateToPool(index, pool)
