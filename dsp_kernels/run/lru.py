"""LRU: a bounded cache that evicts the least recently used entries first."""

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import RLock
from typing import Generic, TypeVar

T = TypeVar("T")

# One lock for all caches: it is held for a dictionary access only, never while a value is made. fork() takes
# it, so no child starts with a cache that another thread had locked or half changed.
_lock = RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class LRU(Generic[T]):
    """Thread-safe cache of at most ``limit`` entries and, given ``size_of``, at most ``max_size`` in total.

    A value larger than ``max_size`` is not kept.
    """

    def __init__(
        self, limit: int, size_of: Callable[[T], int] = lambda value: 0, max_size: float = math.inf
    ) -> None:
        self.limit = limit
        self.max_size = max_size
        self.total_size = 0  # the sum of ``size_of`` over all entries
        self._size_of = size_of
        self._entries: OrderedDict[Hashable, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> T | None:
        """The value of a key, which becomes the most recently used one; None if there is none."""
        with _lock:
            value = self._entries.get(key)
            if value is not None:
                self._entries.move_to_end(key)
            return value

    def put(self, key: Hashable, value: T) -> None:
        """Store a value, replacing an older one of this key, and evict what exceeds the limits."""
        with _lock:
            evicted = self._remove(key)
            self._entries[key] = value
            self.total_size += self._size_of(value)
            evicted += self._evict(self.limit)
        del evicted  # freed without the lock

    def get_or_make(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key; ``make()`` if there is none. Two threads may both make it; the later one stays.

        The entry that has to go is evicted before ``make()``: both at once may not fit into memory.
        """
        value = self.get(key)
        if value is None:
            with _lock:
                evicted = self._evict(self.limit - 1)
            del evicted
            value = make()
            self.put(key, value)
        return value

    def clear(self) -> None:
        with _lock:
            entries, self._entries, self.total_size = self._entries, OrderedDict(), 0
        del entries

    def _remove(self, key: Hashable) -> list[T]:
        if key not in self._entries:
            return []
        value = self._entries.pop(key)
        self.total_size -= self._size_of(value)
        return [value]

    def _evict(self, limit: int) -> list[T]:
        evicted: list[T] = []
        while len(self._entries) > limit or self.total_size > self.max_size:
            evicted += self._remove(next(iter(self._entries)))
        return evicted
