"""CUDA graphs: a function of fixed buffers is captured once and replayed as one launch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import torch

__all__ = ["LRU", "capture", "is_capturing"]

T = TypeVar("T")
_WARM_UP_RUNS = 2  # kernels compile and libraries set themselves up at the first; the second shows it worked


class LRU(Generic[T]):
    """At most ``limit`` things by key; the one unused for longest goes first."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._kept: OrderedDict[Hashable, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The thing of this key, made if it is not there."""
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        while len(self._kept) >= self.limit:  # before making: two at once may not fit into the memory
            self._kept.popitem(last=False)
        made = self._kept[key] = make()
        return made


def is_capturing(device: torch.device) -> bool:
    """Whether somebody is capturing a CUDA graph on the current stream of this device."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def capture(launch: Callable[[], None], device: torch.device, pool: Any) -> Callable[[], None] | None:
    """The launches of ``launch`` as one replay on the current stream, or None if they cannot be captured.

    ``launch`` works on fixed buffers and is run a few times first. pool: of ``torch.cuda.graph_pool_handle``;
    graphs that share one must not be replayed at once. An operation that waits for the GPU, as one of
    somebody's own modules may, cannot be captured.
    """
    with torch.cuda.device(device):
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_RUNS):
                launch()
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
