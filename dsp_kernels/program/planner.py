"""From a traced network to a Program: norms, biases, activations and residuals are folded into other steps.

The planner visits the nodes once and keeps a list of steps. A node that can be folded changes the step that
made its input instead of adding one.
"""

from collections import Counter
from dataclasses import replace
from itertools import product
from math import prod
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPTraceError
from dsp_kernels.graph.network import TracedNetwork, works_in_place
from dsp_kernels.graph.operations.entry import TracedNode, flat
from dsp_kernels.graph.size_check import SizeCheck
from dsp_kernels.op.activations import GATES
from dsp_kernels.op.dense import Conv, batch_norm_affine, fold_affine
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.program import steps
from dsp_kernels.program.steps import Program, Step, TorchStep, ValueRef, flattened_maps, map_nested

S = TypeVar("S", bound=Step)


def plan(network: TracedNetwork) -> Program:
    """The Program of a traced network. Raises DSPTraceError if its answer holds no tensor."""
    return _Planner(network).run()


def conv_spec_of(module: nn.Conv2d | PackedConv2d | FusedConv2d) -> Conv | str:
    """Spec, weights and bias of a convolution; a string with the reason where no spec describes it."""
    if isinstance(module, PackedConv2d | FusedConv2d):
        return module.spec, tuple(weight.detach() for weight in module.weights), _detached(module.bias)
    padding = zero_padding(module)
    if isinstance(padding, str):
        return padding
    structure = GroupStructure.uniform(module.in_channels, module.out_channels, module.groups)
    settings: Any = module.kernel_size, module.stride, padding, module.dilation
    spec = ConvSpec(structure, *settings)
    return spec, tuple(module.weight.detach().chunk(module.groups)), _detached(module.bias)


def zero_padding(module: nn.Conv2d) -> tuple[int, int] | str:
    """(vertical, horizontal) zero padding on each side; a string with the reason for any other padding."""
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


def transposed_conv(module: nn.ConvTranspose2d) -> tuple[Conv, tuple[int, int, int, int]]:
    """Spec, weights and bias of a convolution, and pads, all negative, after its pixel shuffle by the stride.

    Along an axis, tap k of the kernel adds input i to output ``stride * i + dilation * k - padding``. With q
    and r the quotient and rest of ``dilation * k`` by the stride, it is a tap of the convolution for outputs
    of rest r, that reads input ``i - q``.
    """
    stride, most, pads = module.stride[0], list[int](), list[int]()
    settings: Any = module.kernel_size, module.dilation, module.padding, module.output_padding
    for kernel, dilation, padding, more in zip(*settings, strict=True):
        reach = dilation * (kernel - 1)
        most.append(max(reach, reach + more - padding) // stride)
        pads += [-padding, reach + more + 1 - padding - stride * (1 + most[-1])]
    inputs, each, *kernel_size = module.weight.shape
    made = module.weight.new_zeros(inputs, each, stride, stride, most[0] + 1, most[1] + 1)
    for y, x in product(*map(range, kernel_size)):
        down, row = divmod(module.dilation[0] * y, stride)
        right, column = divmod(module.dilation[1] * x, stride)
        made[:, :, row, column, most[0] - down, most[1] - right] = module.weight[:, :, y, x].detach()
    weights = tuple(part.flatten(1, 3).transpose(0, 1).contiguous() for part in made.chunk(module.groups))
    structure = GroupStructure.uniform(inputs, module.out_channels * stride**2, module.groups)
    spec = ConvSpec(structure, (most[0] + 1, most[1] + 1), padding=(most[0], most[1]))
    bias = None if module.bias is None else module.bias.detach().repeat_interleave(stride**2)
    return (spec, weights, bias), (pads[0], pads[1], pads[2], pads[3])


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


class _Planner:
    def __init__(self, network: TracedNetwork) -> None:
        self.network = network
        self.steps: list[Step] = []
        self.value_of: dict[str, str] = {}  # node -> the value that holds its result
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.readers = _count_readers(network)
        self.check: SizeCheck | None = None  # of the first input
        self.first_movable = 0  # steps before it must not move
        held = (*network.graph_module.parameters(), *network.graph_module.buffers())
        self.device = held[0].device if held else torch.device("cpu")

    def run(self) -> Program:
        *nodes, output = self.network
        for node in nodes:
            self._plan_node(node)
        answered = set(self._inputs(output))
        if not answered:
            raise DSPTraceError("fuse() takes a network that answers with tensors, this one returns none")
        inputs = tuple(node.name for node in self.network.of_kind("input"))
        made = (*inputs, *(step.output for step in self.steps))
        outputs = tuple(name for name in made if name in answered)
        answer = map_nested(
            lambda part: self._reference(part) if isinstance(part, fx.Node) else part, output.fx_node.args[0]
        )
        return Program(inputs, outputs, answer, self._live(outputs), self.shapes, self.check)

    def _plan_node(self, node: TracedNode) -> None:
        if node.kind != "input":
            handler = getattr(self, f"_{node.operation.step}") if node.operation.step else None
            step = handler(node) if handler is not None else _UNKNOWN
            if step is None:  # an identity
                return
            if isinstance(step, str):
                step = self._torch(node, step)
            self.steps.append(step)
            if isinstance(step, TorchStep) and works_in_place(node.fx_node, self.network.graph_module):
                # An earlier step may read what it overwrites, so that step must stay before it.
                self.first_movable = len(self.steps)
        self.value_of[node.name] = node.name
        if node.shape is not None:
            self.shapes[node.name] = node.shape

    def _live(self, outputs: tuple[str, ...]) -> tuple[Step, ...]:
        """The steps that the outputs depend on: folding leaves dead computations of sizes."""
        needed, kept = set(outputs), []
        for step in reversed(self.steps):
            if step.output in needed:
                needed.update(step.inputs)
                kept.append(step)
        return tuple(reversed(kept))

    # -- the list of steps -----------------------------------------------------------------------------

    def _inputs(self, node: TracedNode) -> tuple[str, ...]:
        return tuple(self.value_of[name] for name in node.inputs)

    def _reference(self, node: fx.Node) -> Any:
        return ValueRef(self.value_of[node.name])

    def _operands(self, node: TracedNode) -> tuple[str, ...]:
        return tuple(self.value_of[name] for name in node.operands)

    def _instead_of(self, old: Step, new: Step) -> Step:
        """``new``, to be the last step, where all its inputs exist; ``old`` is dropped."""
        self.steps.remove(old)
        return new

    def _extendable(self, name: str, *kinds: type[S]) -> S | None:
        """The step that made a node, if it is of these kinds, has no activation and only one reader."""
        if self.readers[name] != 1:
            return None
        value = self.value_of[name]
        for step in reversed(self.steps[self.first_movable :]):
            if step.output == value and isinstance(step, kinds):
                activated: Any = step.spec if isinstance(step, steps.ConvStep) else step
                return step if getattr(activated, "activation", "none") == "none" else None
        return None

    def _extendable_conv(self, name: str) -> steps.ConvStep | None:
        """The same for a convolution without a residual."""
        conv = self._extendable(name, steps.ConvStep)
        return conv if conv is not None and len(conv.inputs) == 1 else None

    # -- one method per ``Operation.step``: the step that computes a node, None for an identity, or why there
    # -- is none. Steps that it needs before are appended to the list.

    def _conv(self, node: TracedNode) -> Step | str:
        assert isinstance(node.module, nn.Conv2d | PackedConv2d | FusedConv2d)
        read = conv_spec_of(node.module)
        if isinstance(read, str):
            return read
        return steps.ConvStep(node.name, self._inputs(node), *read, path=node.path)

    def _conv_function(self, node: TracedNode) -> Step:
        read = dict(node.attributes)
        weight, bias, groups = (read.pop(name) for name in ("weight", "bias", "groups"))
        out_channels, each, height, width = weight.shape
        structure = GroupStructure.uniform(each * groups[0], out_channels, groups[0])
        spec = ConvSpec(structure, (height, width), **read)
        weights = tuple(weight.detach().chunk(groups[0]))
        return steps.ConvStep(node.name, self._inputs(node)[:1], spec, weights, _detached(bias))

    def _size_check(self, node: TracedNode) -> str | None:
        if self.check is not None or node.inputs[0] != self.network.of_kind("input")[0].name:
            return _UNKNOWN
        assert isinstance(node.module, SizeCheck)
        self.check = node.module
        self._identity(node)
        return None

    def _conv_transpose(self, node: TracedNode) -> Step | str:
        """A convolution that makes stride x stride pixels of each place as channels, and their shuffle."""
        assert isinstance(node.module, nn.ConvTranspose2d)
        stride = node.module.stride[0]
        if node.module.stride != (stride, stride) or len((*node.fx_node.args, *node.fx_node.kwargs)) != 1:
            return _UNKNOWN  # the second argument is the size of the result
        sizes = zip(node.module.kernel_size, node.module.dilation, strict=True)
        if prod(d * (k - 1) + 2 * stride for k, d in sizes) > 64 * prod(node.module.kernel_size):
            return "its phases would be mostly zeros"
        read, pads = transposed_conv(node.module)
        phases = f"{node.name}_phases"
        self.steps.append(steps.ConvStep(phases, self._inputs(node), *read, path=node.path))
        batch, _, height, width = self.network[node.inputs[0]].shape or ()
        more, channels = read[0].padding, read[0].structure.out_channels
        self.shapes[phases] = batch, channels, height + more[0], width + more[1]
        return steps.ResizeStep(node.name, (phases,), stride, True, pads)

    def _pad(self, node: TracedNode) -> Step | str:
        read, pads = node.attributes, flat(node.attributes["pads"])
        if read["mode"] == "constant" and read["value"] == 0 and read.get("like"):
            return self._fit(node)
        if read["mode"] != "constant" or not all(isinstance(pad, int) for pad in pads):
            return _UNKNOWN
        left, right, top, bottom = (*pads, 0, 0)[:4]
        sides = top, bottom, left, right
        return steps.ResizeStep(node.name, self._inputs(node), pads=sides, value=read["value"])

    def _resize(self, node: TracedNode) -> Step | str:
        factor = node.attributes["factor"]
        return steps.ResizeStep(node.name, self._inputs(node)[:1], factor, True) if factor else _UNKNOWN

    def _interpolate(self, node: TracedNode) -> Step | str:
        factor = node.attributes.get("factor")
        if factor and node.attributes["fit"] == "nearest":
            return steps.ResizeStep(node.name, self._inputs(node)[:1], factor)
        return self._fit(node) if node.attributes["fit"] else _UNKNOWN

    def _fit(self, node: TracedNode) -> Step:
        read, x = node.attributes, self._inputs(node)[:1]
        like = (self.value_of[read["like"]],) if read.get("like") else ()
        return steps.FitStep(node.name, (*x, *like), read["fit"], read.get("size"), read.get("factor", 1))

    def _norm(self, node: TracedNode) -> Step:
        """Of every channel, or group of channels, of every image."""
        norm: Any = node.module
        if getattr(norm, "running_mean", None) is not None:
            return self._batch_norm(node)
        scale = self._per_channel(node, 1.0 if norm.weight is None else norm.weight)
        shift = self._per_channel(node, 0.0 if norm.bias is None else norm.bias)
        groups = getattr(norm, "num_groups", node.width)
        return steps.NormStep(node.name, self._inputs(node), groups, norm.eps, scale, shift)

    def _batch_norm(self, node: TracedNode) -> Step:
        return self._affine(node, node.inputs[0], *batch_norm_affine(node.attributes["norm"]))

    def _affine(self, node: TracedNode, source: str, scale: Tensor, shift: Tensor) -> Step:
        """source * scale + shift, both (channels,) in float64."""
        before: Any = self._extendable_conv(source)
        if before is not None:
            dtype = before.weights[0].dtype if before.weights else torch.float32
            layer = before.spec, before.weights, before.bias
            spec, weights, bias = fold_affine(layer, scale, shift, dtype)
            folded = replace(before, output=node.name, spec=spec, weights=weights, bias=bias)
            return self._instead_of(before, folded)
        inputs = (self.value_of[source],)
        before = self._extendable(source, steps.ElementwiseStep)
        if before is not None and before.kind == "affine":
            self.steps.remove(before)
            inputs, scale, shift = before.inputs, before.scale * scale, before.shift * scale + shift
        return steps.ElementwiseStep(node.name, inputs, "affine", scale=scale, shift=shift)

    def _scale(self, node: TracedNode) -> Step:
        scale, shift = (self._per_channel(node, node.attributes[name]) for name in ("scale", "shift"))
        return self._affine(node, node.inputs[0], scale, shift)

    def _per_channel(self, node: TracedNode, value: float | Tensor) -> Tensor:
        """(channels,) in float64, from one number or one per channel."""
        values = torch.as_tensor(value, device=self.device).detach().double().flatten()
        return values.expand(node.width).clone()

    def _leaky(self, node: TracedNode) -> Step | str:
        """slope * x + relu((1 - slope) * x) for slopes of at most 1."""
        slope, x = self._per_channel(node, node.attributes["slope"]), self._inputs(node)[:1]
        if node.shape is None or len(node.shape) != 4 or not bool((slope <= 1).all()):
            return _UNKNOWN
        below, above = (f"{node.name}_{part}" for part in ("below", "above"))
        zeros = torch.zeros_like(slope)
        self.steps.append(steps.ElementwiseStep(below, x, "affine", scale=slope, shift=zeros))
        self.steps.append(steps.ElementwiseStep(above, x, "affine", "relu", scale=1 - slope, shift=zeros))
        self.shapes |= dict.fromkeys((below, above), node.shape)
        return steps.ElementwiseStep(node.name, (below, above), "add")

    def _activation(self, node: TracedNode) -> Step:
        function = node.attributes["function"]
        kinds = (steps.ConvStep, steps.ElementwiseStep, steps.LinearStep, steps.NormStep)
        before: Any = self._extendable(node.inputs[0], *kinds)
        if before is None or function in GATES:
            return steps.ElementwiseStep(node.name, self._inputs(node)[:1], "activation", function)
        if isinstance(before, steps.ConvStep):
            activated = replace(before, output=node.name, spec=before.spec.with_activation(function))
        else:
            activated = replace(before, output=node.name, activation=function)
        return self._instead_of(before, activated)

    def _add(self, node: TracedNode) -> Step:
        inputs = self._inputs(node)
        if len(inputs) == 2:  # x + x has one
            order = {step.output: position for position, step in enumerate(self.steps)}
            # The convolution that runs last takes the other operand as its residual.
            last = max((0, 1), key=lambda side: order.get(inputs[side], -1))
            for side in (last, 1 - last):
                conv = self._extendable_conv(node.inputs[side])
                if conv is not None:
                    operands = conv.inputs[0], inputs[1 - side]
                    return self._instead_of(conv, replace(conv, output=node.name, inputs=operands))
        return steps.ElementwiseStep(node.name, (inputs[0], inputs[-1]), "add")

    def _pool(self, node: TracedNode) -> Step:
        return steps.PoolStep(node.name, self._inputs(node), node.kind, dict(node.attributes))

    def _global_pool(self, node: TracedNode) -> Step:
        return steps.GlobalPoolStep(node.name, self._inputs(node), node.attributes["keepdim"])

    def _adaptive_pool(self, node: TracedNode) -> Step | str:
        if node.attributes["output_size"] is None:
            return _UNKNOWN
        return steps.PoolStep(node.name, self._inputs(node)[:1], "adaptive_avg_pool", dict(node.attributes))

    def _flatten(self, node: TracedNode) -> Step:
        return steps.FlattenStep(node.name, self._inputs(node)[:1])

    def _linear(self, node: TracedNode) -> Step:
        assert isinstance(node.module, nn.Linear)
        weight, bias = node.module.weight.detach(), _detached(node.module.bias)
        return steps.LinearStep(node.name, self._inputs(node), weight, bias, path=node.path)

    def _identity(self, node: TracedNode) -> None:
        self.value_of[node.name] = self.value_of[node.inputs[0]]

    def _combine(self, node: TracedNode) -> Step | str:
        left, right = (self.network[name] for name in node.operands)
        operation = node.attributes["operation"]
        if left.batched != right.batched:
            return self._with_parameter(node, left, right)
        a, b = (left.shape or (), right.shape or ())
        # One operand may be a single pixel per channel.
        fits = a and (a == b or (len(a) == 4 and a[:2] == b[:2] and (1, 1) in (a[2:], b[2:])))
        if not fits or not self._all_batched(node):
            return _UNKNOWN
        if operation == "subtract" and a == b and len(a) == 4:
            minus, one = f"{node.name}_minus", self._per_channel(node, 1)
            self.steps.append(replace(self._affine(node, right.name, -one, 0 * one), output=minus))
            self.shapes[minus] = a
            return steps.ElementwiseStep(node.name, (self.value_of[left.name], minus), "add")
        if operation != "multiply":
            return _UNKNOWN
        return steps.ElementwiseStep(node.name, self._operands(node), "multiply")

    def _with_parameter(self, node: TracedNode, left: TracedNode, right: TracedNode) -> Step | str:
        x, held = (left, right) if left.batched else (right, left)
        operation = node.attributes["operation"]
        if held.value is None or held.value.numel() != node.width or len(node.shape or ()) != 4:
            return _UNKNOWN
        value = self._per_channel(node, held.value)
        one = torch.ones_like(value)
        if operation == "multiply":
            return self._affine(node, x.name, value, 0 * value)
        signs = (1, -1) if operation == "subtract" else (1, 1)
        of_x, of_held = signs if left is x else signs[::-1]
        return self._affine(node, x.name, of_x * one, of_held * value)

    def _all_batched(self, node: TracedNode) -> bool:
        """Whether all its operands have the batch of the input and the same number of dimensions."""
        operands = [self.network[name] for name in node.operands]
        dims = {len(operand.shape) for operand in operands if operand.shape}
        return all(operand.batched for operand in operands) and len(dims) == 1

    def _concat(self, node: TracedNode) -> Step | str:
        return steps.ConcatStep(node.name, self._operands(node)) if self._all_batched(node) else _UNKNOWN

    def _split(self, node: TracedNode) -> str | None:
        if self._depends_on_size(node) or not _splits_into_pieces(self.network, node):
            return _UNKNOWN
        self._identity(node)  # its pieces select the channels
        return None

    def _select(self, node: TracedNode) -> Step | str:
        order, origin = node.attributes.get("order"), node.attributes.get("origin", node.inputs[0])
        source = self.network[origin]
        if source.kind == "split" and not _splits_into_pieces(self.network, source):
            return _UNKNOWN
        if order is None or self._depends_on_size(node):
            return _UNKNOWN
        return steps.SelectStep(node.name, (self.value_of[origin],), tuple(order.tolist()))

    def _depends_on_size(self, node: TracedNode) -> bool:
        """Whether it reads features whose number depends on the size of the image."""
        flattened = flattened_maps(self.steps, self.shapes)
        return not (flattened.maps | flattened.derived).isdisjoint(self._inputs(node))

    def _torch(self, node: TracedNode, why: str) -> Step:
        fx_node = node.fx_node
        held: Any = node.module
        if fx_node.op == "get_attr":
            held = attrgetter(str(fx_node.target))(self.network.graph_module)
            held = held.detach() if isinstance(held, Tensor) else held

        args = fx.node.map_arg(fx_node.args, self._reference)
        kwargs = fx.node.map_arg(fx_node.kwargs, self._reference)
        # view() may be impossible in the memory layout that an executor chooses; reshape() gives the same.
        target = "reshape" if fx_node.op == "call_method" and fx_node.target == "view" else fx_node.target
        return TorchStep(node.name, self._inputs(node), fx_node.op, target, args, kwargs, held, why)


_UNKNOWN = "not an operation of a Program"


def _count_readers(network: TracedNetwork) -> dict[str, int]:
    """Node -> how many operations read its value, under its own name or through identities."""
    root: dict[str, str] = {}
    count: Counter[str] = Counter()
    for node in network:
        root[node.name] = root[node.inputs[0]] if node.kind == "identity" else node.name
        if node.kind != "identity":
            count.update(root[name] for name in node.inputs)
    return {name: count[source] for name, source in root.items()}


def _splits_into_pieces(network: TracedNetwork, node: TracedNode) -> bool:
    return all(network[user].kind == "piece" for user in node.users)
