"""From a traced network to a Program: every norm, bias, activation and residual goes into a neighbour.

The planner walks the graph once and keeps a list of steps; a node that can be folded changes the step that
made its input instead of adding one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPTraceError
from dsp_kernels.graph.network import TracedNetwork, TracedNode, works_in_place
from dsp_kernels.op.folding import batch_norm_affine, fold_batch_norm
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.program.steps import (
    ActivationStep,
    AdaptivePoolStep,
    AddStep,
    AffineStep,
    ConcatStep,
    ConvStep,
    FlattenStep,
    GateStep,
    GlobalPoolStep,
    LinearStep,
    MulStep,
    PoolStep,
    Program,
    SelectStep,
    Step,
    TorchStep,
    ValueRef,
    flattened_maps,
)

__all__ = [
    "BatchedNodes",
    "conv_spec_of",
    "gate_of",
    "plan",
    "pool_size",
    "selected_channels",
    "splits_into_pieces",
    "zero_padding",
]


def plan(network: TracedNetwork) -> Program:
    """The Program of a traced network with one input and one output tensor.

    Raises DSPTraceError if the network has several inputs or does not return one tensor.
    """
    return _Planner(network).run()


def conv_spec_of(
    module: nn.Conv2d | PackedConv2d,
) -> tuple[ConvSpec, tuple[Tensor, ...], Tensor | None] | str:
    """Spec, weights and bias of a convolution module; for one that a spec cannot say, why not."""
    if isinstance(module, PackedConv2d):
        spec = ConvSpec(module.structure, module.kernel_size, module.stride, module.padding, module.dilation)
        return spec, tuple(weight.detach() for weight in module.weights), _detached(module.bias)
    padding = zero_padding(module)
    if isinstance(padding, str):
        return padding
    structure = GroupStructure.uniform(module.in_channels, module.out_channels, module.groups)
    kernel, stride, dilation = (
        (size[0], size[1]) for size in (module.kernel_size, module.stride, module.dilation)
    )
    spec = ConvSpec(structure, kernel, stride, padding, dilation)
    return spec, tuple(module.weight.detach().chunk(module.groups)), _detached(module.bias)


def zero_padding(module: nn.Conv2d) -> tuple[int, int] | str:
    """Zeros around the input, (vertical, horizontal); why not, for a padding that is something else."""
    if module.padding_mode != "zeros":
        return f"padding mode {module.padding_mode!r}"
    if not isinstance(module.padding, str):
        return module.padding[0], module.padding[1]
    if module.padding == "valid":
        return 0, 0
    total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    if any(amount % 2 for amount in total):
        return "'same' padding that is wider on one side"
    return total[0] // 2, total[1] // 2


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


class _Planner:
    def __init__(self, network: TracedNetwork) -> None:
        self.network = network
        self.steps: list[Step] = []
        self.value_of: dict[str, str] = {}  # node -> the value that holds its result
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.readers = _readers(network)
        self.batched = BatchedNodes(network)
        self.settled = 0  # steps before this one stay where they are
        self.handlers: dict[str, Callable[[TracedNode], None]] = {
            "conv": self._conv,
            "packed_conv": self._conv,
            "fused_conv": self._fused_conv,
            "batch_norm": self._batch_norm,
            "activation": self._activation,
            "add": self._add,
            "max_pool": self._pool,
            "avg_pool": self._pool,
            "global_avg_pool": lambda node: self._emit(
                node, GlobalPoolStep(node.name, self._inputs(node), node.attributes["keepdim"])
            ),
            "flatten": lambda node: self._emit(node, FlattenStep(node.name, self._inputs(node)[:1])),
            "linear": self._linear,
            "identity": self._identity,
            "elementwise": self._elementwise,
            "combine": self._combine,
            "concat": self._concat,
            "split": self._split,
            "piece": self._select,
            "join_channels": self._select,
            "channel_shuffle": self._select,
            "adaptive_pool": self._adaptive_pool,
        }

    def run(self) -> Program:
        inputs, outputs = self.network.of_kind("input"), self.network.of_kind("output")
        if len(inputs) != 1:
            raise DSPTraceError(
                f"a network of one input can be fused, this has {len(inputs)}; swap() takes it"
            )
        if len(outputs) != 1 or outputs[0].shape is None:
            raise DSPTraceError(
                "a network whose answer is one tensor can be fused, this one gives several or a container; "
                "swap() takes it"
            )
        for node in self.network:
            if node.kind == "input":
                self.value_of[node.name] = node.name
                self._remember_shape(node)
            elif node.kind != "output":
                self.handlers.get(node.kind, self._torch)(node)
        output = self._inputs(outputs[0])[0]
        return Program(inputs[0].name, output, self._live(output), self.shapes)

    def _live(self, output: str) -> tuple[Step, ...]:
        """The steps whose values the output depends on; sizes that folding made needless drop out."""
        needed, kept = {output}, []
        for step in reversed(self.steps):
            if step.output in needed:
                needed.update(step.inputs)
                kept.append(step)
        return tuple(reversed(kept))

    # -- helpers ---------------------------------------------------------------------------------------

    def _inputs(self, node: TracedNode) -> tuple[str, ...]:
        return tuple(self.value_of[name] for name in node.inputs)

    def _remember_shape(self, node: TracedNode) -> None:
        if node.shape is not None:
            self.shapes[node.name] = node.shape

    def _emit(self, node: TracedNode, step: Step) -> None:
        self.steps.append(step)
        self.value_of[node.name] = node.name
        self._remember_shape(node)

    def _open(self, name: str, kinds: type[Step] | tuple[type[Step], ...]) -> Step | None:
        """The step behind a node, if it is of these kinds and only one operation reads its result."""
        if self.readers[name] != 1:
            return None
        value = self.value_of[name]
        for step in reversed(self.steps[self.settled :]):
            if step.output == value:
                return (
                    step
                    if isinstance(step, kinds) and getattr(step, "activation", "none") == "none"
                    else None
                )
        return None

    def _replace(self, old: Step, new: Step, node: TracedNode) -> None:
        """``new`` makes the value of ``node`` in place of ``old``, at the end: all it reads exists there."""
        self.steps.remove(old)
        self._emit(node, replace(new, output=node.name))

    # -- one handler per kind ---------------------------------------------------------------------------

    def _conv(self, node: TracedNode) -> None:
        assert isinstance(node.module, nn.Conv2d | PackedConv2d)
        read = conv_spec_of(node.module)
        if isinstance(read, str):
            self._torch(node, read)
        else:
            self._emit(node, ConvStep(node.name, self._inputs(node), *read))

    def _fused_conv(self, node: TracedNode) -> None:
        assert isinstance(node.module, FusedConv2d)
        weights, bias = tuple(w.detach() for w in node.module.weights), _detached(node.module.bias)
        self._emit(node, ConvStep(node.name, self._inputs(node), node.module.spec, weights, bias))

    def _batch_norm(self, node: TracedNode) -> None:
        assert isinstance(node.module, nn.BatchNorm2d)
        conv = self._open(node.inputs[0], ConvStep)
        if isinstance(conv, ConvStep) and conv.spec.activation == "none" and len(conv.inputs) == 1:
            spec, weights, bias = fold_batch_norm(conv.spec, conv.weights, conv.bias, node.module)
            self._replace(conv, replace(conv, spec=spec, weights=weights, bias=bias), node)
            return
        weight = node.module.running_var
        assert weight is not None
        scale, shift = (part.to(weight.dtype) for part in batch_norm_affine(node.module))
        self._emit(node, AffineStep(node.name, self._inputs(node), scale, shift))

    def _activation(self, node: TracedNode) -> None:
        function = node.attributes["function"]
        before = self._open(node.inputs[0], (ConvStep, AddStep, MulStep, AffineStep, LinearStep))
        if isinstance(before, ConvStep) and before.spec.activation == "none":
            self._replace(before, replace(before, spec=before.spec.with_activation(function)), node)
        elif isinstance(before, AddStep | MulStep | AffineStep | LinearStep):
            self._replace(before, replace(before, activation=function), node)
        else:
            self._emit(node, ActivationStep(node.name, self._inputs(node), function))

    def _add(self, node: TracedNode) -> None:
        if len(node.inputs) == 2:  # x + x has one
            order = {step.output: position for position, step in enumerate(self.steps)}
            # The convolution that runs last writes the sum.
            for name in sorted(node.inputs, key=lambda n: order.get(self.value_of[n], -1), reverse=True):
                conv = self._open(name, ConvStep)
                if isinstance(conv, ConvStep) and conv.spec.activation == "none" and len(conv.inputs) == 1:
                    other = next(self.value_of[n] for n in node.inputs if n != name)
                    self._replace(conv, replace(conv, inputs=(conv.inputs[0], other)), node)
                    return
        left, right = self._inputs(node)[0], self._inputs(node)[-1]
        self._emit(node, AddStep(node.name, (left, right)))

    def _pool(self, node: TracedNode) -> None:
        self._emit(node, PoolStep(node.name, self._inputs(node), node.kind, dict(node.attributes)))

    def _linear(self, node: TracedNode) -> None:
        assert isinstance(node.module, nn.Linear)
        weight, bias = node.module.weight.detach(), _detached(node.module.bias)
        self._emit(node, LinearStep(node.name, self._inputs(node), weight, bias))

    def _identity(self, node: TracedNode) -> None:
        self.value_of[node.name] = self.value_of[node.inputs[0]]

    def _elementwise(self, node: TracedNode) -> None:
        gate = gate_of(node)
        if gate is None:
            self._torch(node)
        else:
            self._emit(node, GateStep(node.name, self._inputs(node)[:1], gate))

    def _combine(self, node: TracedNode) -> None:
        names = node.attributes["operands"]
        if node.attributes["operation"] == "multiply" and self.batched.can_multiply(*names):
            self._emit(node, MulStep(node.name, tuple(self.value_of[name] for name in names)))
        else:
            self._torch(node)

    def _concat(self, node: TracedNode) -> None:
        names = node.attributes["operands"]
        if self.batched.all_images(names):
            self._emit(node, ConcatStep(node.name, tuple(self.value_of[name] for name in names)))
        else:
            self._torch(node)

    def _split(self, node: TracedNode) -> None:
        if splits_into_pieces(self.network, node) and not self._of_any_size(node):
            self._identity(node)  # its pieces say which channels they are
        else:
            self._torch(node)

    def _select(self, node: TracedNode) -> None:
        found = selected_channels(self.network, node)
        if found is None or self._of_any_size(node):
            self._torch(node)
        else:
            source, index = found
            self._emit(node, SelectStep(node.name, (self.value_of[source],), index))

    def _of_any_size(self, node: TracedNode) -> bool:
        """Whether it cuts features that are the numbers of a map, which differ with the image."""
        flattened = flattened_maps(self.steps, self.shapes)
        return not (flattened.maps | flattened.derived).isdisjoint(self._inputs(node))

    def _adaptive_pool(self, node: TracedNode) -> None:
        size = pool_size(node)
        if size is None:
            self._torch(node)
        else:
            self._emit(node, AdaptivePoolStep(node.name, self._inputs(node)[:1], size))

    def _torch(self, node: TracedNode, why: str = "not an operation of a Program") -> None:
        fx_node = node.fx_node
        held: Any = node.module
        if fx_node.op == "get_attr":
            held = attrgetter(str(fx_node.target))(self.network.graph_module)
            held = held.detach() if isinstance(held, Tensor) else held
        if node.kind == "scalar":
            why = "a size"

        def reference(source: fx.Node) -> Any:
            return ValueRef(self.value_of[source.name])

        args = fx.node.map_arg(fx_node.args, reference)
        kwargs = fx.node.map_arg(fx_node.kwargs, reference)
        # An executor chooses its memory layout, and view() may be impossible there; the values are the same.
        target = "reshape" if fx_node.op == "call_method" and fx_node.target == "view" else fx_node.target
        step = TorchStep(node.name, self._inputs(node), fx_node.op, target, args, kwargs, held, why)
        self._emit(node, step)
        if works_in_place(fx_node, self.network.graph_module):
            # It writes into what an earlier step may read: that step may not move behind it.
            self.settled = len(self.steps)


def _readers(network: TracedNetwork) -> dict[str, int]:
    """Per node, how many operations read its value, under its own name or through identities."""
    root: dict[str, str] = {}
    count: dict[str, int] = {}
    for node in network:
        root[node.name] = root[node.inputs[0]] if node.kind == "identity" else node.name
        if node.kind != "identity":
            for name in node.inputs:
                count[root[name]] = count.get(root[name], 0) + 1
    return {name: count.get(source, 0) for name, source in root.items()}


_GATE_FUNCTIONS = {
    torch.sigmoid: "sigmoid",
    F.sigmoid: "sigmoid",
    "sigmoid": "sigmoid",
    F.hardsigmoid: "hardsigmoid",
}


class BatchedNodes:
    """The nodes that depend on the network's input: their batch is the input's."""

    def __init__(self, network: TracedNetwork) -> None:
        self._network = network
        self._names: set[str] = set()
        for node in network:
            if node.kind == "input" or self._names.intersection(node.inputs):
                self._names.add(node.name)

    def all_images(self, names: Sequence[str]) -> bool:
        """Whether all are tensors with the batch of the input and one number of axes."""
        shapes = [self._network[name].shape for name in names]
        return self._names.issuperset(names) and len({len(shape) for shape in shapes if shape}) == 1

    def can_multiply(self, left: str, right: str) -> bool:
        """Whether the two have one shape, or one is a single pixel per channel."""
        a, b = self._network[left].shape, self._network[right].shape
        if a is None or b is None or not self.all_images((left, right)) or a[:2] != b[:2]:
            return False
        return a == b or (len(a) == 4 and (1, 1) in (a[2:], b[2:]))


def gate_of(node: TracedNode) -> str | None:
    """The name in ``activations.GATES`` of an elementwise node, or None."""
    if node.module is not None:
        kinds = {nn.Sigmoid.forward: "sigmoid", nn.Hardsigmoid.forward: "hardsigmoid"}
        return kinds.get(type(node.module).forward)
    return _GATE_FUNCTIONS.get(node.fx_node.target)


def splits_into_pieces(network: TracedNetwork, node: TracedNode) -> bool:
    """Whether all that reads a split is a choice of one of its parts."""
    return all(network[user].kind == "piece" for user in node.users)


def selected_channels(network: TracedNetwork, node: TracedNode) -> tuple[str, tuple[int, ...]] | None:
    """The node whose channels a piece or a shuffle holds, and which in which order; None if unknown."""
    source = network[node.inputs[0]]
    if node.kind == "piece":
        known = source.shape is not None or (source.kind == "split" and splits_into_pieces(network, source))
        index = tuple(range(node.attributes["start"], node.attributes["stop"]))
        return (source.name, index) if known and index else None
    if node.kind == "channel_shuffle":
        return source.name, _shuffled(source, node.attributes["groups"])
    # Channels into groups of channels, the two axes exchanged, and back.
    swapped = _before_identities(network, source)
    if swapped.kind != "swap_channels":
        return None
    split = _before_identities(network, network[swapped.inputs[0]])
    if split.kind != "split_channels":
        return None
    origin = network[split.inputs[0]]
    return origin.name, _shuffled(origin, split.attributes["groups"])


def pool_size(node: TracedNode) -> tuple[int, int] | None:
    """(height, width) that an adaptive average pool makes; None for another pool or a size that follows x."""
    if isinstance(node.module, nn.AdaptiveAvgPool2d):
        size = node.module.output_size
    elif node.fx_node.target is F.adaptive_avg_pool2d:
        args = node.fx_node.args
        size = args[1] if len(args) > 1 else node.fx_node.kwargs.get("output_size")  # type: ignore[assignment]
    else:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size) if isinstance(size, tuple | list) else ()
    match pair:
        case (int(height), int(width)):
            return height, width
    return None


def _before_identities(network: TracedNetwork, node: TracedNode) -> TracedNode:
    while node.kind == "identity":
        node = network[node.inputs[0]]
    return node


def _shuffled(source: TracedNode, groups: int) -> tuple[int, ...]:
    assert source.shape is not None
    width = source.shape[1] // groups
    return tuple(group * width + place for place in range(width) for group in range(groups))
