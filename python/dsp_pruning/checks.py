"""Checks of arguments, with one wording for their errors."""

from collections.abc import Set

from dsp_kernels.errors import DSPPruningError


def check(valid: bool, name: str, value: object, expected: str) -> None:
    """Raise DSPPruningError, which shows the value, unless ``valid``."""
    if not valid:
        raise DSPPruningError(f"{name} is {value!r}; expected {expected}")


def check_kind(valid: bool, name: str, value: object, expected: str) -> None:
    """Raise DSPPruningError, which names the type of the value, unless ``valid``."""
    if not valid:
        raise DSPPruningError(f"{name} is a {type(value).__name__}; it must be {expected}")


def check_one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise DSPPruningError unless the value is one of the choices."""
    check(value in choices, name, value, f"one of {', '.join(choices)}")


def check_names(what: str, given: Set[str], expected: Set[str]) -> None:
    """Raise DSPPruningError unless there is one value for every layer."""
    if given != expected:
        missing, unknown = sorted(expected - given), sorted(given - expected)
        raise DSPPruningError(f"{what} for every layer: missing {missing}, unknown {unknown}")


def check_count(name: str, value: object, least: int = 1) -> None:
    """Raise DSPPruningError unless the value is an integer of at least ``least``."""
    check(is_count(value, least), name, value, f"an integer of at least {least}")


def is_count(value: object, least: int = 1) -> bool:
    """Whether the value is an integer, which a bool is not, of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
