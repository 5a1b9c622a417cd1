"""The calls of a model in both modes as one graph, for files."""

from __future__ import annotations

import copy
import operator
from typing import Any

from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPError, DSPFormatError, DSPTraceError
from dsp_kernels.graph.capture import Tracer, calls_of, without_stand_ins
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.graph.network import SIZE_CHECK, evaluating, trace

__all__ = ["TRAINING", "traced_calls"]

# The one attribute of the network itself that a call may read: whether it is in training mode.
TRAINING = "training"
_CHECKS = {"_assert"}  # torch._assert and timm's: they compute nothing
_UNUSED = (
    operator.eq,
    operator.ne,
    operator.lt,
    operator.le,
    operator.gt,
    operator.ge,
    operator.getitem,
    getattr,
)


class _Tracer(Tracer):
    proxy_buffer_attributes = True  # what is computed from a buffer follows it

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not self._is_state(a):  # fx would hang it on the user's model
            raise DSPFormatError(f"forward() makes a tensor of its own, of shape {tuple(a.shape)}")
        return super().create_arg(a)

    def _is_state(self, tensor: Tensor) -> bool:
        return any(tensor is t for t in (*self.root.parameters(), *self.root.buffers()))


def traced_calls(
    model: nn.Module, example_input: Example | None = None
) -> tuple[fx.Graph, str, dict[str, nn.Module]]:
    """The graph of a model, the modes it is right for, and modules that it calls beyond the model's own.

    The modes are "both" or, where training differs, "eval". Where torch.fx cannot follow the model, the graph
    is that of ``trace`` for images such as the example, with its check of sizes.

    Where the modes differ only in flags that follow ``training`` (of functional dropout and norms), these
    flags are read from the network's own mode. Raises DSPFormatError where torch.fx cannot follow.
    """
    inputs = None if example_input is None else as_inputs(example_input)
    count = 1 if inputs is None else len(inputs)
    with evaluating(model):
        try:
            graph = _trace(model, count)
        except DSPFormatError as error:
            if count > 1:
                raise
            return _exported(model, None if inputs is None else inputs[0], error)
        _check_inputs(graph, model, count, inputs is not None)
    try:
        training = _trace_in_training(model, count)
    except DSPError:  # untraceable, or a network of a file that holds eval mode alone
        training = None
    nodes = list(graph.nodes)
    others = list(training.nodes) if training is not None else []
    pairs = dict(zip(others, nodes, strict=False))
    same = len(nodes) == len(others) and all(
        (node.op, node.target) == (other.op, other.target)
        and _same((node.args, node.kwargs), (other.args, other.kwargs), pairs)
        for node, other in zip(nodes, others, strict=True)
    )
    if not same:
        return graph, "eval", {}
    flagged = [
        (n, o) for n, o in zip(nodes, others, strict=True) if _flags((n.args, n.kwargs), (o.args, o.kwargs))
    ]
    if flagged:
        first = next(node for node in graph.nodes if node.op != "placeholder")
        with graph.inserting_before(first):
            flag = graph.create_node("get_attr", TRAINING)
        for node, other in flagged:
            node.args = _follow(node.args, other.args, flag)
            node.kwargs = _follow(node.kwargs, other.kwargs, flag)
    return graph, "both", {}


def _trace_in_training(model: nn.Module, count: int) -> fx.Graph:
    """Of a copy that shares every tensor: the model itself may be answering another thread in eval mode."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        copied = copy.deepcopy(model, shared)
    except Exception:  # what cannot be copied is itself in training mode for a moment
        copied = model
    with evaluating(copied):  # gives every module its mode back
        return _trace(copied.train(), count)


def _exported(
    model: nn.Module, example_input: Tensor | None, first: DSPFormatError
) -> tuple[fx.Graph, str, dict[str, nn.Module]]:
    if example_input is None:
        raise DSPFormatError(f"{first}. Pass save(..., example_input=...): torch.export may follow it then")
    try:
        network = trace(model, example_input)
    except DSPTraceError as error:
        raise DSPFormatError(str(error)) from error
    graph = network.graph_module.graph
    _drop_checks(graph)
    held = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
    own = [str(n.target) for n in graph.nodes if n.op == "get_attr" and str(n.target) not in held]
    if own:
        raise DSPFormatError(f"forward() makes a tensor of its own: {own[0]}")
    return graph, "eval", {} if network.size_check is None else {SIZE_CHECK: network.size_check}


def _trace(model: nn.Module, count: int) -> fx.Graph:
    with without_stand_ins(model) as written:
        try:
            graph = calls_of(_Tracer(), model, count)
        except Exception as error:  # fx raises whatever the model's own code raises on proxies
            raise DSPFormatError(
                f"{type(model).__name__} cannot be traced by torch.fx, so its architecture cannot be written "
                f"to a file: {error}"
            ) from error
    if written:
        raise DSPFormatError(f"{type(model).__name__}.forward() gives the model another {written[0]}")
    _drop_checks(graph)
    return graph


def _check_inputs(graph: fx.Graph, model: nn.Module, count: int, given: bool) -> None:
    taken = sum(node.op == "placeholder" for node in graph.nodes)
    if taken != count:
        raise DSPFormatError(
            f"{type(model).__name__}.forward() takes {taken} inputs{f', the example has {count}' * given}; "
            "pass save(..., example_input=...) with a tuple of all of them"
        )


def _drop_checks(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if not node.users and (name in _CHECKS or (node.op == "call_function" and node.target in _UNUSED)):
            graph.erase_node(node)


def _same(left: Any, right: Any, pairs: dict[fx.Node, fx.Node]) -> bool:
    """Whether two arguments are equal, but for False in eval mode where training mode has True."""
    if isinstance(left, tuple | list):
        return (
            type(left) is type(right)
            and len(left) == len(right)
            and all(_same(a, b, pairs) for a, b in zip(left, right, strict=True))
        )
    if isinstance(left, dict):
        return (
            isinstance(right, dict)
            and left.keys() == right.keys()
            and all(_same(value, right[key], pairs) for key, value in left.items())
        )
    if isinstance(left, slice):
        return isinstance(right, slice) and all(
            _same(getattr(left, part), getattr(right, part), pairs) for part in ("start", "stop", "step")
        )
    if isinstance(left, fx.Node):
        return pairs.get(right) is left
    return (left is False and right is True) or (type(left) is type(right) and left == right)


def _flags(left: Any, right: Any) -> bool:
    if isinstance(left, tuple | list):
        return any(_flags(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        return any(_flags(value, right[key]) for key, value in left.items())
    return left is False and right is True


def _follow(left: Any, right: Any, flag: fx.Node) -> Any:
    if isinstance(left, tuple | list):
        return type(left)(_follow(a, b, flag) for a, b in zip(left, right, strict=True))
    if isinstance(left, dict):
        return {key: _follow(value, right[key], flag) for key, value in left.items()}
    return flag if left is False and right is True else left
