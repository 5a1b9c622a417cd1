"""Choosing among several ways to do one thing, each of which says whether it can and why not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

from dsp_kernels.errors import DSPBackendError

__all__ = ["CanRun", "Registry"]


class CanRun(Protocol):
    """What a registry holds. It may have ``is_worth(*request)`` too, with an answer like that of ``can_run``.

    "auto" passes over what is not worth it; who asks by name gets it.
    """

    name: str

    def can_run(self, *request: Any) -> tuple[bool, str]:
        """Whether this one can serve the request, and the reason if it cannot."""
        ...


T = TypeVar("T", bound=CanRun)


class Registry(Generic[T]):
    """Backends in order of preference; the first that can run a request is the automatic choice."""

    def __init__(self, what: str) -> None:
        self.what = what
        self._items: list[T] = []

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def register(self, item: T, *, first: bool = False) -> T:
        """Add one, last or first in preference."""
        self._items.insert(0 if first else len(self._items), item)
        return item

    def names(self) -> tuple[str, ...]:
        """Names in order of preference."""
        return tuple(item.name for item in self._items)

    def check(self, name: str) -> str:
        """The name itself. Raises DSPBackendError if it is neither "auto" nor known."""
        if name != "auto" and name not in self.names():
            raise DSPBackendError(
                f"{self.what} {name!r} is unknown; known are auto, {', '.join(self.names())}"
            )
        return name

    def choose(self, name: str, *request: Any) -> T:
        """The one of this name, or for "auto" the first that can run the request and is worth it.

        Raises DSPBackendError if the name is unknown or the choice cannot run, with its reason.
        """
        self.check(name)
        reasons = []
        for item in self._items:
            if name in ("auto", item.name):
                able, reason = item.can_run(*request)
                is_worth = getattr(item, "is_worth", None)
                if able and name == "auto" and is_worth is not None:
                    able, reason = is_worth(*request)
                if able:
                    return item
                reasons.append(f"{item.name}: {reason}")
        raise DSPBackendError(f"no {self.what} can run this: {'; '.join(reasons)}")
