"""Capturing CUDA graphs: what it does to the caller's stream, generator and allocator, by a recorded fake."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dsp_kernels.run.gpu.graphs import capture
from dsp_kernels.run.gpu.tune import Choices, Tuner, gpu_seconds

DEVICE = torch.device("cuda", 1)


class FakeCuda:
    """As much of torch.cuda as a capture needs, with the state that a failed one can leave behind."""

    def __init__(self) -> None:
        self.device, self.stream, self.is_capturing = 0, "caller's", False
        self.pool_in_use = False
        self.end_fails = False
        self.replays = 0
        self.most_captures = self.captures = 0
        self.default_generators = [SimpleNamespace(), self]
        self.pools: list[object] = []
        self.devices: list[int] = []  # on which timing waited

    def __call__(self, *_: object) -> Any:  # Stream(device), CUDAGraph()
        return SimpleNamespace(
            wait_stream=lambda other: None,
            capture_begin=self._begin,
            capture_end=self._end,
            replay=self._replay,
        )

    Stream = CUDAGraph = property(lambda self: self)

    def current_stream(self, device: torch.device) -> Any:
        return self()

    def current_device(self) -> int:
        return self.device

    def graph_pool_handle(self) -> tuple[int, int]:
        return 0, len(self.pools)

    @contextmanager
    def in_device(self, device: torch.device) -> Iterator[None]:
        before, self.device = self.device, device.index
        try:
            yield
        finally:
            self.device = before

    @contextmanager
    def in_stream(self, stream: object) -> Iterator[None]:
        before, self.stream = self.stream, "side"
        try:
            yield
        finally:
            self.stream = before

    def event(self, enable_timing: bool) -> Any:
        def record() -> None:
            event.at = self.replays

        event = SimpleNamespace(
            record=record,
            synchronize=lambda: self.devices.append(self.device),
            elapsed_time=lambda end: 30.0 * (end.at - event.at),  # milliseconds
        )
        return event

    def _begin(self, pool: object, capture_error_mode: str) -> None:
        self.pools.append(pool)
        assert (self.device, self.stream, self.is_capturing) == (1, "side", False)
        assert capture_error_mode == "thread_local"
        self.is_capturing = self.pool_in_use = True
        self.captures += 1
        self.most_captures = max(self.most_captures, self.captures)

    def _end(self) -> None:
        assert self.stream == "side"
        self.captures -= 1
        if self.end_fails:  # what torch leaves behind where cudaStreamEndCapture fails
            raise RuntimeError("operation failed due to a previous error during capture")
        self.is_capturing = self.pool_in_use = False

    def _replay(self) -> None:
        self.replays += 1

    # The generator: a copy of its state is not capturing.
    def clone_state(self) -> str:
        return "a copy"

    def graphsafe_set_state(self, state: str) -> None:
        assert state == "a copy"
        self.is_capturing = False

    def end_pool(self, device: int, pool: object) -> None:
        assert device == 1
        self.pool_in_use = False


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    for name in (
        "Stream",
        "CUDAGraph",
        "current_stream",
        "current_device",
        "graph_pool_handle",
        "default_generators",
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    monkeypatch.setattr(torch.cuda, "device", fake.in_device)
    monkeypatch.setattr(torch.cuda, "stream", fake.in_stream)
    for name in ("synchronize", "empty_cache"):
        monkeypatch.setattr(
            torch.cuda, name, lambda *_: pytest.fail("a capture must not wait or free memory")
        )
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", fake.end_pool, raising=False)
    return fake


def assert_as_before(cuda: FakeCuda) -> None:
    assert (cuda.device, cuda.stream, cuda.is_capturing, cuda.pool_in_use) == (0, "caller's", False, False)


def test_a_replay_launches_nothing_itself(cuda: FakeCuda) -> None:
    launches: list[str] = []
    replay = capture(lambda: launches.append(cuda.stream), DEVICE, None)
    assert launches == ["side"] * 3
    assert replay is not None
    replay()
    assert (len(launches), cuda.replays) == (3, 1)
    assert_as_before(cuda)


@pytest.mark.parametrize("end_fails", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("synchronised"), KeyboardInterrupt()], ids=repr)
def test_a_failed_capture_leaves_everything_as_it_was(
    error: BaseException, end_fails: bool, cuda: FakeCuda
) -> None:
    def launch() -> None:
        if cuda.is_capturing:
            raise error

    cuda.end_fails = end_fails
    if isinstance(error, RuntimeError):
        with pytest.warns(UserWarning, match="launched one by one .synchronised"):
            assert capture(launch, DEVICE, None) is None
    else:
        with pytest.raises(KeyboardInterrupt):
            capture(launch, DEVICE, None)
    assert_as_before(cuda)
    cuda.end_fails = False
    assert capture(lambda: None, DEVICE, None) is not None


def test_a_capture_that_only_its_end_refuses(cuda: FakeCuda) -> None:
    cuda.end_fails = True
    with pytest.warns(UserWarning, match="previous error during capture"):
        assert capture(lambda: None, DEVICE, None) is None
    assert_as_before(cuda)


def test_one_capture_at_a_time_in_a_process(cuda: FakeCuda) -> None:
    inside = threading.Semaphore(1)

    def launch() -> None:
        if cuda.is_capturing:
            assert inside.acquire(blocking=False), "two captures at once"
            threading.Event().wait(0.002)
            inside.release()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: capture(launch, DEVICE, None), range(12)))
    assert cuda.most_captures == 1


def test_a_launch_may_capture_another_network(cuda: FakeCuda) -> None:
    inner: list[object] = []

    def launch() -> None:
        if not inner:
            inner.append(capture(lambda: None, DEVICE, None))

    assert capture(launch, DEVICE, None) is not None
    assert cuda.captures == 0
    assert inner != [None]


def test_timing_is_on_the_device_of_the_tensors_and_uses_one_pool(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", cuda.event)
    freed: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append(None))
    for _ in range(2):
        with Tuner(Choices(tmp_path / "choices"), partial(gpu_seconds, DEVICE)) as tuner:
            options = dict.fromkeys("ab", lambda: lambda: None)
            assert tuner.fastest(["conv", len(freed)], options) == "a"
    assert set(cuda.devices) == {DEVICE.index}
    assert len(cuda.pools) == 4
    assert cuda.pools[0] == cuda.pools[1] != cuda.pools[2] == cuda.pools[3]
    assert len(freed) == 2
    assert gpu_seconds(DEVICE, lambda: None) == 30e-3 / 10  # ten launches per replay
