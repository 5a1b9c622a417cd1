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
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [p for p in inspect.signature(model.forward).parameters.values() if p.kind in kinds]
    rest = [] if count is None else [p for p in names[count:] if p.default is not inspect.Parameter.empty]
    fixed = {
        p.name: p.default for p in rest if p.default is None or isinstance(p.default, bool | int | float)
    }
    # A Proxy is never None and has no truth: ``if mask is not None`` would take the wrong way.
    graph = tracer.trace(model, concrete_args=fixed or None)
    wanted = {f"{name}_1" for name in fixed}
    for node in [n for n in graph.nodes if n.op == "placeholder" and str(n.target) in wanted]:
        _erase(graph, node)
    return graph


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """A node and all that reads it: torch.fx only compares such an argument with its default."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
