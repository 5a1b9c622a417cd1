"""The cache that keeps the most recently used entries."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dsp_kernels.run.lru import LRU


def test_evicts_the_least_recently_used_entry() -> None:
    cache: LRU[int] = LRU(2)
    made = []
    for key in (1, 2, 1, 3, 1, 2):
        assert cache.get_or_make(key, lambda key=key: made.append(key) or key) == key
    assert made == [1, 2, 3, 2]
    assert len(cache) == 2
    assert [cache.get(key) for key in (1, 2, 3)] == [1, 2, None]


def test_evicts_before_it_makes() -> None:
    cache: LRU[str] = LRU(1)
    cache.put("old", "old")
    assert cache.get_or_make("new", lambda: f"{len(cache)} left") == "0 left"


@pytest.mark.parametrize(
    ("values", "kept"),
    [("a bb ccc", ["bb", "ccc"]), ("aaaaa", ["aaaaa"]), ("a bbbbbb", []), ("a a a a bb ccc", ["bb", "ccc"])],
)
def test_total_size_is_bounded(values: str, kept: list[str]) -> None:
    cache: LRU[str] = LRU(10, size_of=len, max_size=5)
    for value in values.split():
        cache.put(value, value)
    assert [value for value in values.split() if cache.get(value) is not None] == kept
    assert cache.total_size == sum(map(len, kept))
    cache.clear()
    assert (len(cache), cache.total_size) == (0, 0)


def test_many_threads() -> None:
    cache: LRU[int] = LRU(5, size_of=lambda value: value, max_size=20)

    def use(first: int) -> None:
        for turn in range(2000):
            number = (first * turn) % 13
            assert cache.get_or_make(number, lambda number=number: number) == number

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(1, 9)))
    kept = [number for number in range(13) if cache.get(number) is not None]
    assert len(kept) == len(cache) <= 5
    assert sum(kept) == cache.total_size <= 20


def test_a_child_forked_while_another_thread_uses_a_cache() -> None:
    cache: LRU[int] = LRU(3)
    done = threading.Event()

    def use() -> None:
        number = 0
        while not done.is_set():
            cache.put(number % 5, number := number + 1)

    user = threading.Thread(target=use)
    user.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                cache.put("child", 1)
                os._exit(0 if len(cache) <= 3 and cache.get("child") == 1 else 1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        done.set()
        user.join()
