"""What forward() is given: the example inputs of a model, and arguments that keep their default."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPShapeError

__all__ = ["Example", "as_inputs", "calls_of"]

# An image, or the tensors that forward() takes, the image first; all have the batch along dimension 0.
Example = Tensor | Sequence[Tensor]


def as_inputs(example: Example) -> tuple[Tensor, ...]:
    """The tensors of an example. Raises DSPShapeError for anything else."""
    inputs = (example,) if isinstance(example, Tensor) else tuple(example) if _is_list(example) else ()
    if not inputs or not all(isinstance(x, Tensor) and x.dim() and len(x) for x in inputs):
        raise DSPShapeError(
            f"the example is a {type(example).__name__}; expected a tensor of at least one image, or a tuple "
            "of tensors, one for each input of forward()"
        )
    return inputs


def calls_of(tracer: fx.Tracer, model: nn.Module, count: int | None) -> fx.Graph:
    """The graph of a model that is given ``count`` inputs; other arguments of forward() keep their default.

    count: None where it is not known; every argument is an input then.
    """
    arguments = _arguments(model)  # in the order in which torch.fx makes their placeholders
    given = len(arguments) if count is None else count
    fixed = {
        place: argument
        for place, argument in enumerate(arguments)
        if (place >= given or (count is not None and argument.kind is argument.KEYWORD_ONLY))
        and (argument.default is None or isinstance(argument.default, bool | int | float))
    }
    # A Proxy is never None and has no truth: ``if mask is not None`` would take the wrong way.
    concrete = {argument.name: argument.default for argument in fixed.values()}
    graph = tracer.trace(model, concrete_args=concrete or None)
    # By place: torch.fx calls that of ``mask`` "mask_1", as another argument may be called.
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for place in fixed:
        _erase(graph, placeholders[place])
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


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
