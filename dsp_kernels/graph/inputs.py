"""What forward() is given: the example inputs of a model, and arguments that keep their default."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPShapeError

__all__ = ["Example", "as_inputs", "calls_of", "check_device", "check_taken", "one_image"]

# An image, or the tensors that forward() takes, the image first; all have the batch along dimension 0.
Example = Tensor | Sequence[Tensor]


def as_inputs(example: Example) -> tuple[Tensor, ...]:
    """The tensors of an example. Raises DSPShapeError for anything else, naming the input that is wrong."""
    several = isinstance(example, list | tuple)
    inputs = tuple(example) if several else (example,)
    for place, x in enumerate(inputs, 1):
        found = f"has shape {tuple(x.shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        if not isinstance(x, Tensor) or not x.dim() or not len(x):
            raise _not_an_example(f"input {place} of the example" if several else "the example", found)
    if not inputs:
        raise _not_an_example("the example", f"is an empty {type(example).__name__}")
    return inputs


def check_taken(model: nn.Module, graph: fx.Graph, inputs: Sequence[Tensor]) -> None:
    """Raise DSPShapeError where a graph of the model has no place for one of these inputs."""
    places = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    if len(inputs) > len(places) and not any(
        place.startswith("*") and not place.startswith("**") for place in places
    ):
        raise DSPShapeError(
            f"{type(model).__name__}.forward() takes {len(places)} input{'s' * (len(places) != 1)}; input "
            f"{len(places) + 1} of the example, of shape {tuple(inputs[len(places)].shape)}, has no place"
        )


def one_image(model: nn.Module, example: Example) -> Tensor:
    """The one input of a network that takes nothing but images: (batch, channels, height, width).

    Raises DSPShapeError for anything else, and for one that is not where the model is.
    """
    x, *others = as_inputs(example)
    if others:
        raise DSPShapeError(
            f"a fused network has one input: input 2 of the example, of shape {tuple(others[0].shape)}, has "
            "no place. swap(model) makes the convolutions of a model of several inputs fast"
        )
    if x.dim() != 4:
        raise DSPShapeError(
            f"the example has shape {tuple(x.shape)}; expected (batch, channels, height, width)"
        )
    check_device(model, x)
    return x


def check_device(model: nn.Module, x: Tensor) -> None:
    """Raise DSPShapeError where nothing of the model is on the device of its example."""
    devices = [tensor.device for tensor in (*model.parameters(), *model.buffers())]
    if devices and x.device not in devices:
        raise DSPShapeError(f"the example is on {x.device}; expected {devices[0]}, as the model")


def _not_an_example(what: str, found: str) -> DSPShapeError:
    return DSPShapeError(
        f"{what} {found}; expected a tensor of at least one image, or a tuple of tensors, one for each input "
        "of forward()"
    )


def calls_of(tracer: fx.Tracer, model: nn.Module, count: int | None) -> fx.Graph:
    """The graph of a model that is given ``count`` inputs; other arguments of forward() keep their default.

    count: None where it is not known; every argument is an input then.
    Raises whatever the model's own code raises on stand-ins for tensors, and may leave them in the model:
    see ``trace_state``.
    """
    arguments = _arguments(model)  # in the order in which torch.fx makes their placeholders
    given = len(arguments) if count is None else count
    fixed = {
        place: argument
        for place, argument in enumerate(arguments)
        if (place >= given or (count is not None and argument.kind is argument.KEYWORD_ONLY))
        and (argument.default is None or isinstance(argument.default, bool | int | float | str))
    }
    # A Proxy is never None and has no truth: ``if mask is not None`` would take the wrong way.
    concrete = {argument.name: argument.default for argument in fixed.values()}
    with _alone():
        graph = tracer.trace(model, concrete_args=concrete or None)
    # By place: torch.fx calls that of ``mask`` "mask_1", as another argument may be called.
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for place in fixed:
        _erase(graph, placeholders[place])
    # What nobody gives and nothing reads.
    placed = sum(argument.kind is not argument.KEYWORD_ONLY for argument in arguments)
    for node in placeholders[len(arguments) :]:
        keywords = str(node.target).startswith("**")
        if not node.users and (keywords or (count is not None and count <= placed)):
            graph.erase_node(node)
    return graph


def _arguments(model: nn.Module) -> list[inspect.Parameter]:
    """What forward() takes beside self, ``*args`` and ``**kwargs``; by keyword only at the end."""
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    # The class's function, as torch.fx does, whatever somebody has put on the instance.
    named = list(inspect.signature(type(model).forward).parameters.values())[1:]
    return [argument for argument in named if argument.kind not in several]


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """A node and all that reads it: torch.fx only compares such an argument with its default."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


_tracing = threading.RLock()
_methods = nn.Module.__call__, nn.Module.__getattr__  # while a trace runs: what they were before it


def _begin_anew() -> None:
    """In a forked child, which has none of the threads that may have been tracing."""
    global _tracing
    _tracing = threading.RLock()
    _put_back()


def _put_back() -> None:
    nn.Module.__call__, nn.Module.__getattr__ = _methods  # type: ignore[method-assign]


@contextmanager
def _alone() -> Iterator[None]:
    """One trace at a time: torch.fx replaces two methods of nn.Module, and of two traces that do not end in
    reverse order the last would leave those of the first in their place.
    """
    global _methods
    with _tracing:
        outer, _methods = _methods, (nn.Module.__call__, nn.Module.__getattr__)
        try:
            yield
        finally:
            _put_back()
            _methods = outer


os.register_at_fork(after_in_child=_begin_anew)
