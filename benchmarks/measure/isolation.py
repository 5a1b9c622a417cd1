"""Engines in processes of their own: no engine's threads, memory or settings touch another's."""

from __future__ import annotations

import multiprocessing
import signal
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from dsp_kernels.errors import DSPBackendError

from ..cases import Case, build_case, case_input
from ..report.results import Row
from ..subjects.networks import NetworkSource, load_network
from .timing import LocalTimer

__all__ = ["IsolatedEngine"]

_PATIENCE = 900.0  # seconds that a build or a burst may take: torch.compile's max-autotune needs minutes


@dataclass(frozen=True)
class _Work:
    source: NetworkSource
    case: Case
    batch: int
    seed: int
    device: str
    threads: int


class IsolatedEngine:
    """A case in a process of its own; a Timer while ``row`` says "ok". To be closed.

    The other process waits between its turns without using a core.
    """

    def __init__(
        self,
        source: NetworkSource,
        case: Case,
        batch: int,
        *,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        spawn = multiprocessing.get_context("spawn")  # a fork would inherit the threads of this process
        self._pipe, theirs = spawn.Pipe()
        work = _Work(source, case, batch, seed, device, torch.get_num_threads())
        self._process = spawn.Process(target=_serve, args=(work, theirs), daemon=True)
        self._process.start()
        theirs.close()
        self._name = case.label
        try:
            self.row: Row = self._receive()
        except BaseException:
            self.close()
            raise

    def warm_up(self, seconds: float) -> float:
        """See ``Timer``."""
        return self._ask("warm_up", seconds)

    def burst(self, warm_calls: int, calls: int, repeats: int) -> list[float]:
        """See ``Timer``."""
        return self._ask("burst", warm_calls, calls, repeats)

    def close(self) -> None:
        """End the process."""
        self._pipe.close()  # the other side reads the end of the pipe and leaves
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()

    def _ask(self, *question: Any) -> Any:
        return self._receive(question)

    def _receive(self, question: tuple[Any, ...] = ()) -> Any:
        """The answer. Raises DSPBackendError where the process has died or does not answer."""
        try:
            if question:
                self._pipe.send(question)
            if not self._pipe.poll(_PATIENCE):
                raise EOFError
            return self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(1)  # for its exit code
            raise DSPBackendError(
                f"the process of {self._name} gave no answer (exit code {self._process.exitcode})"
            ) from error


def _serve(work: _Work, pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the other side, which then closes the pipe
    torch.set_num_threads(work.threads)
    network = load_network(work.source)
    x = case_input(network, work.batch, work.seed, work.device)
    row, run = build_case(work.case, network, x)
    synchronize = torch.cuda.synchronize if x.is_cuda else None
    with suppress(EOFError, OSError):  # the other side has gone
        pipe.send(row)
        if run is None:
            return
        timer = LocalTimer(lambda: run(x), synchronize)
        while True:
            name, *arguments = pipe.recv()
            pipe.send(getattr(timer, name)(*arguments))
