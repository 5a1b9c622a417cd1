"""Backends in order of preference, each of which answers whether it can run a request and why not."""

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from dsp_kernels.errors import DSPBackendError

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries in order of preference; "auto" takes the first that can run a request and is worth it.

    An entry has a ``name`` and ``can_run(*request)`` -> (whether it can, the reason if not). It may have
    ``is_worth(*request)`` with the same kind of answer: "auto" skips an entry that can run but would be
    slower than the next one. An explicit choice is honoured.
    what: what an entry is called in error messages.
    """

    def __init__(self, what: str, *entries: T) -> None:
        self.what = what
        self._entries: list[Any] = list(entries)

    def __iter__(self) -> Iterator[T]:
        return iter(self._entries)

    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self._entries)

    def check(self, name: str) -> str:
        """The name itself. Raises DSPBackendError if it is neither "auto" nor registered."""
        if name != "auto" and name not in self.names():
            raise DSPBackendError(
                f"{self.what} {name!r} is unknown; known are auto, {', '.join(self.names())}"
            )
        return name

    def choose(self, name: str, *request: Any) -> T:
        """The entry of this name, or for "auto" the first that can run the request and is worth it.

        Raises DSPBackendError if the name is unknown or the choice cannot run, with its reason.
        """
        return next(self.candidates(name, *request))

    def candidates(self, name: str, *request: Any) -> Iterator[T]:
        """What ``choose`` takes, and for "auto" what to try if that fails, in order. Raises as it does."""
        self.check(name)
        reasons, found = [], False
        for entry in self._entries:
            if name in ("auto", entry.name):
                able, reason = entry.can_run(*request)
                is_worth = getattr(entry, "is_worth", None)
                if able and name == "auto" and is_worth is not None:
                    able, reason = is_worth(*request)
                if able:
                    found = True
                    yield entry
                reasons.append(f"{entry.name}: {reason}")
        if not found:
            raise DSPBackendError(f"no {self.what} can run this: {'; '.join(reasons)}")
