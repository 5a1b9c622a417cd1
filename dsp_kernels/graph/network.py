"""A model as a graph: torch.fx nodes with a known kind, its attributes and the shape of the result.

``fuse``, ``pack`` and ``save`` read this graph; operations are recognised in one place: operations/table.py.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPTraceError, DSPVerificationError
from dsp_kernels.graph.capture import CONSTANT, Tracer, symbolic_graph, without_stand_ins
from dsp_kernels.graph.compare import compare_answers, tensors_of
from dsp_kernels.graph.inputs import Example, as_inputs, check_taken
from dsp_kernels.graph.operations.entry import TracedNode, channel_axis
from dsp_kernels.graph.operations.table import UNKNOWN, classify, operations_of
from dsp_kernels.graph.size_check import SizeCheck, fixed_size
from dsp_kernels.graph.sized import SizedTracer
from dsp_kernels.tolerances import network_tolerance

SIZE_CHECK = "size_check"  # path of the SizeCheck in a graph for one size


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@dataclass(frozen=True)
class Captured:
    """The calls of a model, without shapes.

    constants: tensors that forward() makes, by their names in the graph.
    check: of the image size that the graph is right for; None if it is right for all.
    sized: whether sizes are numbers, as of the example. written: buffers that forward() changed.
    """

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    check: SizeCheck | None
    sized: bool
    written: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TracedNetwork:
    """The nodes of a network by name, in execution order.

    graph_module: the fx graph module; it shares its submodules with the traced model.
    captured: the calls, as the model makes them.
    """

    graph_module: fx.GraphModule
    nodes: Mapping[str, TracedNode]
    captured: Captured

    def __getitem__(self, name: str) -> TracedNode:
        return self.nodes[name]

    def __iter__(self) -> Iterator[TracedNode]:
        return iter(self.nodes.values())

    def of_kind(self, *kinds: str) -> tuple[TracedNode, ...]:
        """All nodes of these kinds, in execution order."""
        return tuple(node for node in self if node.kind in kinds)

    def calls(self, path: str) -> tuple[TracedNode, ...]:
        """All nodes that call the module at this path: several if it is reused."""
        return tuple(node for node in self if node.path == path)


def captured(
    model: nn.Module, inputs: Sequence[Tensor], training: bool = False, count: int | None = None
) -> Captured:
    """The calls of a model in eval or training mode; it stays as it was.

    Where sizes have to be numbers and the inputs are one batch of images, they are those of these images.
    count: of the inputs, if () is given for unknown ones; None for all arguments of forward().

    Raises DSPTraceError, naming the line of the model's code.
    """
    if (kept := kept_captured(model, training)) is not None:
        return kept
    count = len(inputs) or count
    tracers: list[Tracer] = [Tracer(), Tracer(buffers=False)]
    if len(inputs) == 1 and inputs[0].dim() == 4:
        tracers.append(SizedTracer(inputs[0]))
    with evaluating(model), without_stand_ins(model) as written:
        model.train(training)
        for tracer in tracers:
            try:
                graph = symbolic_graph(model, count, tracer)
                break
            except DSPTraceError as error:
                refusal = error
        else:
            raise refusal
        targets = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
        constants = {name: getattr(model, name) for name in targets if name.startswith(CONSTANT)}
        sized = isinstance(tracer, SizedTracer)
        if sized and not training:
            _compare(model, fx.GraphModule(model, copy.deepcopy(graph)), inputs[0][:1])
    uses_size = isinstance(tracer, SizedTracer) and tracer.uses_size
    check = fixed_size(*inputs[0].shape[2:]) if uses_size else None
    return Captured(graph, constants, check, sized, tuple(written))


# For ``save``: fingerprints of the networks that ``pack`` made, and their calls by training mode.
_kept: WeakKeyDictionary[nn.Module, tuple[Any, dict[bool, Captured]]] = WeakKeyDictionary()


def keep_captured(model: nn.Module, graphs: Mapping[bool, Captured]) -> None:
    """Let ``captured`` answer with these graphs, by training mode, as long as the model stays as it is."""
    _kept[model] = _fingerprint(model), dict(graphs)


def kept_captured(model: nn.Module, training: bool) -> Captured | None:
    """What was kept for a model; the caller may change its graph."""
    fingerprint, graphs = _kept.get(model, (None, {}))
    if training not in graphs or fingerprint != _fingerprint(model):
        return None
    return replace(graphs[training], graph=copy.deepcopy(graphs[training].graph))


def _fingerprint(model: nn.Module) -> Any:
    """All that forward() may depend on besides tensors."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):  # of parameters, buffers and hooks too
            return [(key, plain(part)) for key, part in value.items()]
        if isinstance(value, list | tuple | set):
            return type(value), [plain(part) for part in value]
        if isinstance(value, Tensor):
            return value.shape, value.dtype, value.device
        return value if isinstance(value, bool | int | float | str | type(None)) else (type(value), id(value))

    modules = model.named_modules(remove_duplicate=False)
    return [(p, type(m), {n: plain(v) for n, v in vars(m).items() if n != "training"}) for p, m in modules]


def call_graph(model: nn.Module) -> fx.Graph | None:
    """The calls of a model in eval mode; None if it cannot be traced."""
    try:
        return captured(model, ()).graph
    except DSPTraceError:
        return None


def trace(model: nn.Module, example_input: Example) -> TracedNetwork:
    """Trace a model in eval mode by torch.fx.

    example_input: (batch, channels, height, width), on the model's device; or a tuple of tensors, one for
        each input of forward().

    If forward() of a model of one input needs sizes as Python numbers, it is traced for the example's height
    and width. A graph that depends on them begins with a SizeCheck.

    The model does not change.
    Raises DSPTraceError if torch.fx cannot trace the model, naming the line of its code, or if the model does
    not run on the example; DSPShapeError for an example of more inputs than forward() takes.
    """
    inputs = as_inputs(example_input)
    with evaluating(model), without_stand_ins(model) as written:
        found = captured(model, inputs)
        check_taken(model, found.graph, inputs)
        for name, constant in found.constants.items():
            setattr(model, name, constant)
        graph_module = fx.GraphModule(model, copy.deepcopy(found.graph))
        if found.check is not None:
            graph_module.add_submodule(SIZE_CHECK, found.check)
            insert_check(graph_module.graph)
        _make_inplace_explicit(graph_module)
        graph_module.recompile()
        recorder = _Recorder(graph_module)
        try:
            with torch.no_grad():
                recorder.run(*(x.clone() for x in inputs))  # a model may write into its input
        except Exception as error:
            raise DSPTraceError(
                f"{type(model).__name__} does not run on an example input of shape "
                f"{' and '.join(f'{tuple(x.shape)} and dtype {x.dtype}' for x in inputs)}, at "
                f"{recorder.running!r}: {error}{_dtype_advice(model, inputs)}"
            ) from error
    changed = (*found.written, *written)
    if changed:
        raise DSPTraceError(
            f"{type(model).__name__}.forward() writes into {changed[0]} in eval mode; expected a forward() "
            "that changes no buffer and no part of a tensor in place"
        )
    return TracedNetwork(graph_module, recorder.nodes, found)


def _compare(model: nn.Module, graph_module: fx.GraphModule, image: Tensor) -> None:
    """Raise DSPTraceError if a graph whose numbers are those of several images is wrong for one."""
    bound = network_tolerance(image.dtype, 4096, 100)  # as of most networks: products per sum, layers
    with torch.no_grad():
        expected, got = (run(image.clone()) for run in (model, graph_module))
    try:
        compare_answers(expected, got, bound, "its graph gives another answer", "one image")
    except DSPVerificationError as error:
        raise DSPTraceError(f"{type(model).__name__} cannot be traced: {error}") from error


def insert_check(graph: fx.Graph) -> None:
    """Let a graph begin with a call of the module SIZE_CHECK with its image."""
    image = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(image):
        checked = graph.call_module(SIZE_CHECK, (image,))
    image.replace_all_uses_with(checked, lambda user: user is not checked)


class _Recorder(fx.Interpreter):
    """Runs the graph once and describes every node."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module)
        self.nodes: dict[str, TracedNode] = {}
        self.extra_traceback = False
        self.running = ""

    def run_node(self, n: fx.Node) -> Any:
        self.running = n.name
        result = super().run_node(n)
        self.nodes[n.name] = self._describe(n, result)
        return result

    def _describe(self, n: fx.Node, result: Any) -> TracedNode:
        path = str(n.target) if n.op == "call_module" else ""
        module = self.module.get_submodule(path) if path else None
        shape = tuple(result.shape) if isinstance(result, Tensor) else None
        operation, attributes = classify(n, module, shape, self.nodes)
        if operation.kind == "scalar" and tensors_of(result):  # a container of tensors
            operation = UNKNOWN
        sources = [self.nodes[source.name] for source in n.all_input_nodes]
        batched = n.op == "placeholder" or any(source.batched for source in sources)
        held = bool(sources) and all(source.value is not None for source in sources)
        known = operation.kind == "state" or (operation.channels == "same" and held)
        axis = 1 if batched else channel_axis(shape or ())
        width = shape[axis] if shape is not None and axis is not None and len(shape) > axis else 0
        value = result if known and isinstance(result, Tensor) else None
        inputs, users = tuple(node.name for node in sources), tuple(node.name for node in n.users)
        width = attributes.get("width", width)
        described = path, module, attributes, shape, width, value, batched
        return TracedNode(n.name, operation, inputs, users, *described, fx_node=n)


def _dtype_advice(model: nn.Module, inputs: Sequence[Tensor]) -> str:
    own = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), None)
    if own is None or all(x.dtype == own or not x.dtype.is_floating_point for x in inputs):
        return ""
    return f". The weights are {own}: give an example of that dtype; fuse(..., dtype=...) computes in another"


def _make_inplace_explicit(graph_module: fx.GraphModule) -> None:
    """Let nodes that read a tensor after an in-place operation read the result of that operation.

    All aliasing is then in the edges of the graph, so nodes can be replaced freely.
    """
    graph = graph_module.graph
    position = {node: place for place, node in enumerate(graph.nodes)}
    owner: dict[fx.Node, fx.Node] = {}  # node -> first node with the same memory
    aliases: dict[fx.Node, list[fx.Node]] = {}  # owner -> all nodes with its memory
    for node in graph.nodes:
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        writes = first is not None and works_in_place(node, graph_module)
        path = str(node.target) if node.op == "call_module" else ""
        called = operations_of(graph_module.get_submodule(path)) if path else ()
        same_memory = writes or any(entry.kind == "identity" for entry in called)
        owner[node] = owner[first] if first is not None and same_memory else node
        if writes:
            for alias in aliases[owner[node]]:
                for reader in list(alias.users):
                    if position[reader] > position[node]:
                        reader.replace_input_with(alias, node)
        aliases.setdefault(owner[node], []).append(node)


def works_in_place(node: fx.Node, model: nn.Module) -> bool:
    """Whether a node writes into its first argument."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(getattr(node.target, "__name__", node.target))
    special = name in ("iadd", "isub", "imul", "itruediv") or name.startswith("__i")
    return bool(node.kwargs.get("inplace") or special or (name.endswith("_") and not name.endswith("__")))
