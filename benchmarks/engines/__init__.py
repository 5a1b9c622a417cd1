"""One file per engine: ``available()`` says whether it can run here, ``prepare()`` makes a callable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor, nn

from . import fused, released, torch_eager

__all__ = ["ENGINES", "Engine", "Runner"]

Runner = Callable[[Tensor], Tensor]


class Engine(Protocol):
    """A way of running a network. Modules of this package have this form."""

    def available(self) -> tuple[bool, str]:
        """Whether it runs on this machine; if not, why."""

    def prepare(self, model: nn.Module, example: Tensor) -> Runner:
        """A callable for inputs like ``example`` that gives what ``model`` gives in eval mode."""


ENGINES: dict[str, Engine] = {"released": released, "packed": torch_eager, "fused": fused}
