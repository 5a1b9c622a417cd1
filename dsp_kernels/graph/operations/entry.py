"""What an entry of the table of operations says, and what it is told of a call.

Channels are the entries of a tensor along dimension 1; so are the features after a flatten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

Shape = tuple[int, ...] | None  # None for what is not a tensor
Modules = Mapping[type[nn.Module], tuple[str, ...]]  # with the settings that a file keeps
Attributes = dict[str, Any]
Found = Attributes | None  # the attributes of a call; None if it is another operation
# (attributes, constants of every operand, whether parameters keep their values) -> constants of the result.
# Constants are [channels] float64, NaN where a channel varies.
Constants = Callable[[Mapping[str, Any], Sequence[Tensor], bool], Tensor]


def first_operand(attributes: Mapping[str, Any], values: Sequence[Tensor], frozen: bool) -> Tensor:
    """The constants of the first operand: the operation leaves a channel that is constant as it is."""
    return values[0]


@dataclass(frozen=True)
class Operation:
    """One operation: how it is recognised, and all that the rest of the package has to know of it.

    kind: its name; several entries may share one.
    modules: class -> the arguments of its constructor that a file keeps, which its modules have as attributes
        of the same names; "bias" means whether there is one. A subclass with a forward() of its own does not
        count.
    calls: names of functions and methods: "torch.add F.relu operator.add .add".
    attributes: of a call, in one form however it is written; None if it is another operation after all.
    channels: how they pass. "same": channel c of every operand goes into channel c; "index": channel
        ``index[k][c]`` of the operand goes into channel c, for every k; "joined": those of the operands, one
        after the other; "mixed": by a matrix of kernels; "new": none passes; "barrier": unknown.
    constants: what becomes of constant channels.
    step: of a Program: the method of ``program.planner``; "" if it runs as plain PyTorch.
    widths: attributes of a module with parameters that hold the number of channels of its result.
    reads: those that hold the number of channels of its input, where it may be another one.
    on_grid: whether it takes (batch, a, b, height, width), whose channels are a * b.
    reason: why it is a barrier, if that is known.

    A call's attributes may hold "operands" (names of the tensors whose channels pass; default: the first
    input), "parts" (channels are equal parts that lose the same ones) and "rigid" (the code names a number
    of channels or the index of one, so it is wrong after channels are removed).
    """

    kind: str
    modules: Modules = field(default_factory=dict)
    calls: str = ""
    attributes: Callable[[Call], Found] = lambda call: {}
    channels: Literal["same", "index", "joined", "mixed", "new", "barrier"] = "barrier"
    constants: Constants = first_operand
    step: str = ""
    widths: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    on_grid: bool = False
    reason: str = ""


@dataclass(frozen=True)
class TracedNode:
    """One operation of a traced network.

    operation, kind: its entry in the table and its kind; "opaque" if the operation is not known.
    attributes: its settings, in one form however it was written.
    inputs: names of the nodes that it reads, in argument order; users: of the nodes that read it.
    path, module: the module that it calls; "" and None for functions.
    shape: of the result for the example input; None if it is not a tensor.
    width: number of channels of the result; 0 where it has none.
    value: of a tensor that is computed from parameters and buffers only; it is on their device.
    batched: whether it depends on an input, so that dimension 0 is the batch.
    """

    name: str
    operation: Operation
    inputs: tuple[str, ...]
    users: tuple[str, ...]
    path: str
    module: nn.Module | None
    attributes: Mapping[str, Any]
    shape: tuple[int, ...] | None
    width: int
    value: Tensor | None
    batched: bool
    fx_node: fx.Node = field(repr=False, compare=False)

    @property
    def kind(self) -> str:
        return self.operation.kind

    @property
    def operands(self) -> tuple[str, ...]:
        """Names of the tensors whose channels pass to the result."""
        return self.attributes.get("operands") or self.inputs[:1]

    @property
    def axis(self) -> int:
        """The dimension of the channels."""
        return 1 if self.batched or self.shape is None else channel_axis(self.shape) or 0

    def describe(self) -> str:
        """Name, callee and shape, for error messages."""
        target = self.path or getattr(self.fx_node.target, "__name__", str(self.fx_node.target))
        what = type(self.module).__name__ if self.module is not None else self.fx_node.op
        return f"node {self.name!r} ({what} {target!r}, output shape {self.shape})"


def channel_axis(shape: Sequence[int]) -> int | None:
    """Dimension of the channels of a parameter that is added to maps or multiplies them; None if unknown."""
    leading = len(shape) in (2, 4)  # [1, C] and [1, C, H, W], otherwise [C] and [C, H, W]
    return int(leading) if 1 <= len(shape) <= 4 and not (leading and shape[0] != 1) else None


@dataclass(frozen=True)
class Call:
    """One call of a module, function or method. before: the traced nodes before it, by name."""

    node: fx.Node
    module: nn.Module | None
    output: Shape
    before: Mapping[str, TracedNode]

    @property
    def first(self) -> TracedNode | None:
        """The first argument, if it is a node."""
        return self.traced(self.argument(0, "input", None))

    @property
    def input(self) -> Shape:
        """Shape of the first argument."""
        return None if self.first is None else self.first.shape

    @property
    def is_map(self) -> bool:
        """Whether the first argument is (batch, channels, height, width)."""
        return self.first is not None and self.first.batched and len(self.input or ()) == 4

    @property
    def target(self) -> str:
        """Name of the function or method."""
        return str(getattr(self.node.target, "__name__", self.node.target))

    def traced(self, value: Any) -> TracedNode | None:
        """The node of an argument."""
        return self.before.get(value.name) if isinstance(value, fx.Node) else None

    def argument(self, place: int, name: str, default: Any) -> Any:
        """An argument, given by position or by name."""
        return self.node.args[place] if len(self.node.args) > place else self.node.kwargs.get(name, default)

    def settings(self, **defaults: Any) -> Attributes:
        """The module's settings of these names, or the arguments after the first, in this order."""
        if self.module is not None:
            return {name: getattr(self.module, name) for name in defaults}
        return {name: self.argument(i, name, value) for i, (name, value) in enumerate(defaults.items(), 1)}

    def sizes(self) -> list[Any]:
        """All leaves of the positional arguments after the first."""
        return flat(self.node.args[1:])


def flat(value: Any) -> list[Any]:
    """All leaves of nested tuples, lists and dicts."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for part in value for leaf in flat(part)] if isinstance(value, list | tuple) else [value]


def zeros_of(constant: Tensor) -> Tensor:
    """The constants that are zero; every other channel varies."""
    return torch.where(constant == 0, constant, torch.nan)
