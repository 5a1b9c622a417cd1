"""Reading the arguments of one fx node, however they were passed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

__all__ = ["Classified", "Shapes", "argument", "flat", "literal", "source_shape"]

Shapes = Mapping[str, tuple[int, ...] | None]  # node -> shape of its output, None where it is no tensor
Classified = tuple[str, dict[str, Any]]  # a kind of ``trace_ops.KINDS`` and its attributes


def source_shape(node: fx.Node, shapes: Shapes) -> tuple[int, ...] | None:
    """Shape of the first argument, None where that is no tensor."""
    source = node.args[0] if node.args else None
    return shapes.get(source.name) if isinstance(source, fx.Node) else None


def argument(node: fx.Node, place: int, name: str, default: Any) -> Any:
    """The argument at this place, or of this name."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def literal(value: Any) -> bool:
    """Whether a size is a number in the model's code, and not -1 or one computed from another size."""
    return isinstance(value, int) and value > 0


def flat(value: Any) -> Sequence[Any]:
    """All leaves of nested tuples, lists and dicts."""
    if isinstance(value, Mapping):
        return [leaf for part in value.values() for leaf in flat(part)]
    if isinstance(value, list | tuple):
        return [leaf for part in value for leaf in flat(part)]
    return [value]
