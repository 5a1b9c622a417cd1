"""The cache that keeps the most recently used entries."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

from dsp_kernels.run.lru import LRU


def test_evicts_the_least_recently_used_entry_before_it_makes_a_new_one() -> None:
    cache: LRU[int] = LRU(2)
    made = []
    for key in (1, 2, 1, 3, 1, 2):
        assert cache.get_or_make(key, lambda key=key: made.append(len(cache)) or key) == key
    assert made == [0, 1, 1, 1]
    assert [cache.get(key) for key in (1, 2, 3)] == [1, 2, None]


def test_many_threads_exceed_neither_the_count_nor_the_total_size() -> None:
    cache: LRU[int] = LRU(5, size_of=lambda value: value, max_size=20)
    assert cache.get_or_make("larger than all", lambda: 21) == 21
    assert len(cache) == 0

    def use(first: int) -> None:
        for turn in range(500):
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
