"""The calls of a model in training and eval mode as one graph."""

import copy
from typing import Any

from torch import fx, nn

from dsp_kernels.errors import DSPError, DSPFormatError, DSPTraceError
from dsp_kernels.file.format import TRAINING
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.graph.network import Captured, captured, kept_captured


def traced_calls(model: nn.Module, example_input: Example | None = None) -> tuple[Captured, str]:
    """The calls of a model, and the modes they are right for.

    The modes are "both", or "eval" where training mode runs other operations. Arguments that are True in
    training mode only (of functional dropout and norms) become reads of the attribute ``training``.
    Where forward() needs sizes as numbers, the calls are those of eval mode for the example's size.
    Raises DSPFormatError for a model that cannot be traced.
    """
    inputs = () if example_input is None else as_inputs(example_input)
    count = len(inputs) or 1
    try:
        found = captured(model, inputs, count=count)
    except DSPTraceError as error:
        advice = "" if inputs else ". Pass save(..., example_input=...): sizes are numbers then"
        raise DSPFormatError(f"{error}{advice}") from error
    if found.written:
        raise DSPFormatError(f"{type(model).__name__}.forward() gives the model another {found.written[0]}")
    taken = sum(node.op == "placeholder" for node in found.graph.nodes)
    if taken != count:
        has = f", the example has {count}" if inputs else ""
        raise DSPFormatError(
            f"{type(model).__name__}.forward() takes {taken} inputs{has}; "
            "pass save(..., example_input=...) with a tuple of all of them"
        )
    if found.sized:
        return found, "eval"
    try:
        training = _captured_in_training(model, count)
    except DSPError:  # cannot be traced, or holds eval mode only
        return found, "eval"
    both = not training.written and _merge_training(found.graph, training.graph)
    return found, "both" if both else "eval"


def _captured_in_training(model: nn.Module, count: int) -> Captured:
    """The calls of a copy that shares every tensor: another thread may run the model in eval mode."""
    if (kept := kept_captured(model, training=True)) is not None:
        return kept
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        copied = copy.deepcopy(model, shared)
    except Exception:  # a model that cannot be copied is itself in training mode for a moment
        copied = model
    return captured(copied, (), training=True, count=count)


class _DiffersError(Exception):
    """The graphs of the two modes differ in more than flags."""


def _merge_training(graph: fx.Graph, training: fx.Graph) -> bool:
    """Let arguments that are False in ``graph`` and True in ``training`` follow the mode; whether it can."""
    nodes, others = list(graph.nodes), list(training.nodes)
    pairs = dict(zip(others, nodes, strict=False))
    with graph.inserting_before(next(node for node in nodes if node.op != "placeholder")):
        flag = graph.create_node("get_attr", TRAINING)
    try:
        if [(node.op, node.target) for node in nodes] != [(node.op, node.target) for node in others]:
            raise _DiffersError
        merged = [
            (_merge(a.args, b.args, pairs, flag), _merge(a.kwargs, b.kwargs, pairs, flag))
            for a, b in zip(nodes, others, strict=True)
        ]
        for node, (args, kwargs) in zip(nodes, merged, strict=True):
            node.args, node.kwargs = args, kwargs
    except _DiffersError:
        return False
    finally:
        if not flag.users:
            graph.erase_node(flag)
    return True


def _merge(evaluated: Any, trained: Any, pairs: dict[fx.Node, fx.Node], flag: fx.Node) -> Any:
    """Arguments for both modes. pairs: nodes of the training graph -> their nodes in the eval graph."""
    leaves: list[Any] = []
    forms = [fx.node.map_aggregate(arguments, lambda leaf: None) for arguments in (evaluated, trained)]
    fx.node.map_aggregate(trained, leaves.append)
    if forms[0] != forms[1]:
        raise _DiffersError
    others = iter(leaves)

    def merged(leaf: Any) -> Any:
        other = next(others)
        if leaf is False and other is True:
            return flag
        other = pairs.get(other) if isinstance(other, fx.Node) else other
        if type(leaf) is not type(other) or leaf != other:
            raise _DiffersError
        return leaf

    return fx.node.map_aggregate(evaluated, merged)
