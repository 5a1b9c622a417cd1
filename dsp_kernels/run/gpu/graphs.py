"""CUDA graphs: launches on fixed buffers are captured once and replayed as one launch."""

from collections.abc import Callable
from typing import Any

import torch


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
    may, cannot be captured.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            launch()  # compiles kernels and initialises libraries
            launch()  # shows that it worked
        torch.cuda.current_stream(device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(graph, pool=pool, stream=side, capture_error_mode="thread_local"):
                launch()
        except RuntimeError:
            torch.cuda.synchronize(device)
            return None
    return graph.replay
