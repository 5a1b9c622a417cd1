"""The network as data: a torch.fx graph whose nodes carry a known kind, its settings and its output shape.

``fuse`` and ``pack`` both read this graph, so the table of known operations (``trace_ops``) exists once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPError, DSPTraceError
from dsp_kernels.graph.capture import is_leaf, symbolic_graph, without_stand_ins
from dsp_kernels.graph.export import export_calls, exported_network
from dsp_kernels.graph.inputs import Example, as_inputs, check_taken
from dsp_kernels.graph.operations import classify
from dsp_kernels.graph.size_check import SizeCheck

__all__ = [
    "TracedNetwork",
    "TracedNode",
    "call_graph",
    "evaluating",
    "trace",
    "works_in_place",
]


@dataclass(frozen=True)
class TracedNode:
    """One operation of a traced network.

    kind: one of ``trace_ops.KINDS``; ``"opaque"`` where the operation is not known.
    inputs: names of the nodes it reads, in argument order; users: names of the nodes that read it.
    path: dotted path of the module it calls, "" for functions; module: that module.
    attributes: settings of the operation in one form, whatever way it was written.
    shape: shape of its output for the example input, None where it is not a tensor.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    users: tuple[str, ...]
    path: str
    module: nn.Module | None
    attributes: Mapping[str, Any]
    shape: tuple[int, ...] | None
    fx_node: fx.Node = field(repr=False, compare=False)

    def describe(self) -> str:
        """How an error message calls this node: name, what it runs and where in the source it stands."""
        target = self.path or getattr(self.fx_node.target, "__name__", str(self.fx_node.target))
        what = type(self.module).__name__ if self.module is not None else self.fx_node.op
        return f"node {self.name!r} ({what} {target!r}, output shape {self.shape})"


class TracedNetwork:
    """The nodes of a network in the order in which they run.

    graph_module: the fx graph module; it shares its submodules with the traced model.
    size_check: which images the graph is right for, where it is not right for all that the model takes.
    two_ways: whether it computes what the model does with one image and what it does with several.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        nodes: tuple[TracedNode, ...],
        size_check: SizeCheck | None = None,
        two_ways: bool = False,
    ) -> None:
        self.graph_module = graph_module
        self.nodes = nodes
        self.size_check = size_check
        self.two_ways = two_ways
        self._by_name = {node.name: node for node in nodes}

    def __getitem__(self, name: str) -> TracedNode:
        return self._by_name[name]

    def __iter__(self) -> Iterator[TracedNode]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)

    def of_kind(self, *kinds: str) -> tuple[TracedNode, ...]:
        """All nodes of these kinds, in execution order."""
        return tuple(node for node in self.nodes if node.kind in kinds)

    def calls(self, path: str) -> tuple[TracedNode, ...]:
        """All nodes that call the module at this dotted path (more than one where it is reused)."""
        return tuple(node for node in self.nodes if node.path == path)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode and give every module its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


class _ShapeRecorder(fx.Interpreter):
    """Runs the graph once and keeps the shape of every tensor, freeing values as they are used up."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.shapes: dict[str, tuple[int, ...] | None] = {}
        self.containers: set[str] = set()  # values that are no tensor but hold some
        self.extra_traceback = False
        self.running = ""

    def run_node(self, n: fx.Node) -> Any:
        self.running = n.name
        result = super().run_node(n)
        self.shapes[n.name] = tuple(result.shape) if isinstance(result, Tensor) else None
        if _holds_tensors(result):
            self.containers.add(n.name)
        return result


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(isinstance(part, Tensor) or _holds_tensors(part) for part in value.values())
    if isinstance(value, tuple | list):
        return any(isinstance(part, Tensor) or _holds_tensors(part) for part in value)
    return False


def call_graph(
    model: nn.Module, training: bool = False, example_input: Example | None = None
) -> fx.Graph | None:
    """The calls of a model in eval or training mode, without shapes; None if nothing can follow it.

    example_input: (batch, channels, height, width), for models that torch.fx cannot follow; or a tuple.
    """
    inputs = None if example_input is None else as_inputs(example_input)
    with evaluating(model), without_stand_ins(model):
        try:
            model.train(training)
        except DSPError:  # a loaded network whose file holds eval mode only
            return None
        try:
            return symbolic_graph(model, None if inputs is None else len(inputs))
        except DSPTraceError:
            pass
        try:
            if inputs is None or len(inputs) != 1:
                return None
            return export_calls(model, inputs[0], is_leaf, mutates=True).graph
        except DSPTraceError:
            return None


def trace(model: nn.Module, example_input: Example, every_path: bool = False) -> TracedNetwork:
    """Trace ``model`` in eval mode, by torch.fx or, where its code is too much for that, by torch.export.

    example_input: (batch, channels, height, width), on the model's device; or a tuple of tensors, one for
        each input of forward(), which torch.fx has to be able to follow then.
    every_path: where forward() goes another way for a batch of one image, trace both ways as one network
        that gives both answers; otherwise such a model is refused.

    The model is left as it was: modes, buffers and parameters do not change.
    Raises DSPTraceError if neither can follow the model, naming the line of its code, or if the model cannot
    run on the example; DSPShapeError for an example of more inputs than forward() takes.
    """
    inputs = as_inputs(example_input)
    with evaluating(model), without_stand_ins(model) as written:
        check = None
        try:
            graph_module = fx.GraphModule(model, symbolic_graph(model, len(inputs)))
            two_ways = False
        except DSPTraceError as error:
            if len(inputs) > 1:
                raise
            graph_module, check, two_ways = exported_network(model, inputs[0], every_path, is_leaf, error)
        check_taken(model, graph_module.graph, inputs)
        _read_results_of_inplace(graph_module.graph, graph_module)
        graph_module.recompile()
        recorder = _ShapeRecorder(graph_module)
        try:
            with torch.no_grad():
                # a model may write into its input
                recorder.run(*(x[:1].clone() if two_ways else x.clone() for x in inputs))
        except Exception as error:
            raise DSPTraceError(
                f"{type(model).__name__} does not run on an example input of shape "
                f"{' and '.join(f'{tuple(x.shape)} and dtype {x.dtype}' for x in inputs)}, at "
                f"{recorder.running!r}: {error}{_hint(model, inputs)}"
            ) from error
    if written:
        raise DSPTraceError(
            f"{type(model).__name__}.forward() writes into {written[0]} in eval mode; expected a forward() "
            "that changes no buffer and no part of a tensor in place"
        )
    return TracedNetwork(graph_module, tuple(_read_nodes(graph_module, recorder, model)), check, two_ways)


def _hint(model: nn.Module, inputs: Sequence[Tensor]) -> str:
    """What to do about an example of another floating dtype than the weights'; else nothing."""
    own = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), None)
    if own is None or all(x.dtype == own or not x.dtype.is_floating_point for x in inputs):
        return ""
    return f". The weights are {own}: give an example of that dtype; fuse(..., dtype=...) computes in another"


def _read_results_of_inplace(graph: fx.Graph, model: nn.Module) -> None:
    """Let whoever reads a tensor after an operation changed it in place read that operation's result.

    The graph then says by its edges what the model does by aliasing, and may be rewritten freely.
    """
    position = {node: place for place, node in enumerate(graph.nodes)}
    owner: dict[fx.Node, fx.Node] = {}  # node -> the node whose memory it hands on
    names: dict[fx.Node, list[fx.Node]] = {}  # owner -> all nodes that are its memory
    for node in graph.nodes:
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        writes = first is not None and works_in_place(node, model)
        owner[node] = owner[first] if first is not None and (writes or _hands_on(node, model)) else node
        if writes:
            for alias in names[owner[node]]:
                for reader in list(alias.users):
                    if position[reader] > position[node]:
                        reader.replace_input_with(alias, node)
        names.setdefault(owner[node], []).append(node)


def _hands_on(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node's result is its first argument itself, in eval mode."""
    return node.op == "call_module" and isinstance(
        model.get_submodule(str(node.target)), nn.Identity | nn.Dropout | nn.Dropout2d
    )


def works_in_place(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node writes into its first argument."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and (not name.endswith("__") or name.startswith("__i"))
    name = getattr(node.target, "__name__", "")
    return bool(
        node.op == "call_function"
        and (
            node.kwargs.get("inplace")
            or name in ("iadd", "isub", "imul", "itruediv")
            or (name.endswith("_") and not name.endswith("__"))
        )
    )


def _read_nodes(
    graph_module: fx.GraphModule, recorder: _ShapeRecorder, model: nn.Module
) -> Iterator[TracedNode]:
    shapes = recorder.shapes
    for fx_node in graph_module.graph.nodes:
        module = graph_module.get_submodule(str(fx_node.target)) if fx_node.op == "call_module" else None
        kind, attributes = classify(fx_node, module, shapes, model)
        if kind == "scalar" and fx_node.name in recorder.containers:
            kind = "opaque"
        yield TracedNode(
            name=fx_node.name,
            kind=kind,
            inputs=tuple(node.name for node in fx_node.all_input_nodes),
            users=tuple(node.name for node in fx_node.users),
            path=str(fx_node.target) if fx_node.op == "call_module" else "",
            module=module,
            attributes=attributes,
            shape=shapes[fx_node.name],
            fx_node=fx_node,
        )
