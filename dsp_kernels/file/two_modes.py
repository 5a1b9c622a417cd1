"""The calls of a model in training and eval mode as one graph."""

import copy
import operator
from typing import Any

from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPError, DSPFormatError, DSPTraceError
from dsp_kernels.file.format import TRAINING
from dsp_kernels.graph.capture import Tracer, symbolic_graph, without_stand_ins
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.graph.network import SIZE_CHECK, evaluating, trace

_ASSERTS = ("_assert",)  # torch._assert and timm's
_PURE = {getattr, operator.getitem, *(getattr(operator, n) for n in ("eq", "ne", "lt", "le", "gt", "ge"))}


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

    The modes are "both", or "eval" where training mode runs other operations. Arguments that are True in
    training mode only (of functional dropout and norms) become reads of the attribute ``training``.
    Where forward() needs sizes as numbers, the graph is that of ``trace``, in eval mode, with its SizeCheck.
    Raises DSPFormatError for a model that cannot be traced.
    """
    inputs = None if example_input is None else as_inputs(example_input)
    count = 1 if inputs is None else len(inputs)
    with evaluating(model):
        try:
            graph = _trace(model, count)
        except DSPFormatError as error:
            if inputs is None:
                raise DSPFormatError(
                    f"{error}. Pass save(..., example_input=...): sizes are numbers then"
                ) from error
            if count > 1:
                raise
            return _trace_for_size(model, inputs[0])
        _check_inputs(graph, model, count, inputs is not None)
    try:
        training = _trace_in_training(model, count)
    except DSPError:  # cannot be traced, or holds eval mode only
        return graph, "eval", {}
    return graph, "both" if _merge_training(graph, training) else "eval", {}


def _trace_in_training(model: nn.Module, count: int) -> fx.Graph:
    """The graph of a copy that shares every tensor: another thread may run the model in eval mode."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        copied = copy.deepcopy(model, shared)
    except Exception:  # a model that cannot be copied is itself in training mode for a moment
        copied = model
    with evaluating(copied):  # restores the modes
        return _trace(copied.train(), count)


def _trace_for_size(model: nn.Module, example_input: Tensor) -> tuple[fx.Graph, str, dict[str, nn.Module]]:
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
            graph = symbolic_graph(model, count, _Tracer())
        except DSPTraceError as error:
            raise DSPFormatError(str(error)) from error
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
    """Remove asserts and the comparisons that only they read."""
    for node in reversed(list(graph.nodes)):
        if node.op != "call_function" or node.users:
            continue
        if node.target in _PURE or getattr(node.target, "__name__", "") in _ASSERTS:
            graph.erase_node(node)


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
    """One argument for both modes. pairs: nodes of the training graph -> their nodes in the eval graph."""
    if evaluated is False and trained is True:
        return flag
    if isinstance(evaluated, fx.Node):
        if pairs.get(trained) is evaluated:
            return evaluated
    elif type(evaluated) is not type(trained):
        raise _DiffersError
    elif isinstance(evaluated, slice):
        parts = [(s.start, s.stop, s.step) for s in (evaluated, trained)]
        return slice(*(_merge(a, b, pairs, flag) for a, b in zip(*parts, strict=True)))
    elif isinstance(evaluated, tuple | list):
        if len(evaluated) == len(trained):
            return type(evaluated)(_merge(a, b, pairs, flag) for a, b in zip(evaluated, trained, strict=True))
    elif isinstance(evaluated, dict):
        if evaluated.keys() == trained.keys():
            return {key: _merge(value, trained[key], pairs, flag) for key, value in evaluated.items()}
    elif evaluated == trained:
        return evaluated
    raise _DiffersError
