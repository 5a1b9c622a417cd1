"""Engines in processes of their own: they share no threads, memory or settings."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from dsp_kernels.errors import DSPBackendError

from ..cases import Case, build_case, case_input
from ..report.results import Row
from ..subjects.networks import NetworkSource, load_network
from .timing import LocalTimer

_PATIENCE = 900.0  # seconds that a build or a burst may take: torch.compile's max-autotune needs minutes

_timer: LocalTimer  # of the process that runs one engine


class IsolatedEngine:
    """A case in a process of its own; a ``Timer`` if ``row.status`` is "ok". Must be closed.

    Raises DSPBackendError if the process dies or does not answer.
    """

    def __init__(
        self, source: NetworkSource, case: Case, batch: int, *, seed: int = 0, device: str = "cpu"
    ) -> None:
        self._name = case.label
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit the threads of this process
        # Ctrl-C is handled by this process only.
        self._pool = ProcessPoolExecutor(1, spawn, signal.signal, (signal.SIGINT, signal.SIG_IGN))
        self.pid: int = self._ask(os.getpid)
        try:
            self.row: Row = self._ask(_build, source, case, batch, seed, device, torch.get_num_threads())
        except BaseException:
            self.close()
            raise

    def warm_up(self, seconds: float) -> float:
        """See ``Timer``."""
        return self._ask(_warm_up, seconds)

    def burst(self, warm_calls: int, calls: int, repeats: int) -> list[float]:
        """See ``Timer``."""
        return self._ask(_burst, warm_calls, calls, repeats)

    def close(self) -> None:
        """End the process, even in the middle of a call."""
        if not self._answer.done():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self._pool.shutdown()

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            self._answer: Future[Any] = self._pool.submit(function, *arguments)
            return self._answer.result(_PATIENCE)
        except Exception as error:
            raise DSPBackendError(f"the process of {self._name} failed: {error!r}") from error


def _build(source: NetworkSource, case: Case, batch: int, seed: int, device: str, threads: int) -> Row:
    global _timer
    torch.set_num_threads(threads)
    network = load_network(source)
    x = case_input(network, batch, seed, device)
    row, run = build_case(case, network, x)
    if run is not None:
        _timer = LocalTimer(lambda: run(x), torch.cuda.synchronize if x.is_cuda else None)
    return row


def _warm_up(seconds: float) -> float:
    return _timer.warm_up(seconds)


def _burst(warm_calls: int, calls: int, repeats: int) -> list[float]:
    return _timer.burst(warm_calls, calls, repeats)
