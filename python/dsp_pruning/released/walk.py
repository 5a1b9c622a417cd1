"""From the calls of a traced network of branches to a packed network.

The walk follows data, not module names: a *branch* is what comes of gathering channels, a convolution, a
norm and maybe a ReLU; branches that are concatenated, or added into one tensor at listed channels, become
one packed convolution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dsp_kernels import GroupStructure, PackedConv2d
from dsp_kernels.errors import DSPError, DSPFormatError
from dsp_kernels.file.decode import LoadedNetwork
from dsp_pruning.released.archive import Call, State

__all__ = [
    "HANDLERS",
    "NORM",
    "Branch",
    "Gathered",
    "Image",
    "Owner",
    "Scatter",
    "Walk",
    "copy_state",
]


@dataclass(frozen=True)
class Owner:
    """A module of the archive."""

    path: str


@dataclass(frozen=True)
class Image:
    """A tensor of the network: the node that makes it, and its channels where they are known."""

    node: fx.Node
    channels: int | None


@dataclass(frozen=True)
class Gathered:
    """Some channels of a tensor."""

    source: Image
    index: tuple[int, ...]


@dataclass(frozen=True)
class Branch:
    """settings: stride, padding, dilation; norm: weight, bias, mean, variance."""

    source: Image
    index: tuple[int, ...]
    weight: State
    bias: State | None
    settings: tuple[Any, ...]
    norm: tuple[State, State, State, State] | None = None
    norm_settings: tuple[float, float] = (1e-5, 0.1)
    relu: bool = False


@dataclass(frozen=True)
class Scatter:
    """Branches that are added into a tensor, each at the channels of its list."""

    base: Image
    branches: tuple[Branch, ...]
    places: tuple[tuple[int, ...], ...]


@dataclass
class Walk:
    """own, x: names of the network itself and of its input; state: the archive's tensors.

    handlers: per kind of call a function of the walk and the operands, see ``torchscript_ops``.
    """

    own: str
    x: str
    state: dict[str, Tensor]
    handlers: Mapping[str, Callable[[Walk, list[Any]], Any]]
    values: dict[str, Any] = field(init=False)
    graph: fx.Graph = field(default_factory=fx.Graph, init=False)
    root: nn.Module = field(default_factory=nn.Module, init=False)
    placed: set[str] = field(default_factory=set, init=False)
    pooled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.values = {self.own: Owner(""), self.x: Image(self.graph.placeholder("x"), None)}

    def step(self, call: Call) -> None:
        """Follow one call. Raises DSPFormatError for one that no released network holds."""
        handler = self.handlers.get(call.kind.removesuffix("_"))
        if handler is None:
            raise DSPFormatError(f"{call.kind} is not known here")
        operands = (
            [call.value] if call.kind == "prim::Constant" else [self.values[name] for name in call.inputs]
        )
        if call.kind == "prim::GetAttr":
            operands.append(call.value)
        result = handler(self, operands)
        if call.kind.endswith("_"):  # in place: whoever reads the operand later reads the result
            self._replace(operands[0], result)
        for name, value in zip(call.outputs, result if len(call.outputs) > 1 else [result], strict=True):
            self.values[name] = value

    def network(self, output: str) -> LoadedNetwork:
        """The packed network whose answer is the value of this name."""
        self.graph.output(self.image(self.values[output]).node)
        for node in reversed(list(self.graph.nodes)):
            if not node.users and node.op not in ("placeholder", "output"):
                self.graph.erase_node(node)  # of a block that was pruned away whole, for example
        called = {str(node.target) for node in self.graph.nodes if node.op == "call_module"}
        for path in self.placed - called:
            parent, _, name = path.rpartition(".")
            delattr(self.root.get_submodule(parent), name)
        first = next((m for m in self.root.modules() if isinstance(m, nn.Conv2d | PackedConv2d)), None)
        if first is None:
            raise DSPFormatError("it holds no convolution")
        size = 224 if self.pooled else 32
        return LoadedNetwork(self.root, self.graph, ((1, first.in_channels, size, size),))

    def image(self, value: Any) -> Image:
        """The tensor itself, made of its branches if it still is some."""
        if isinstance(value, Image):
            return value
        if isinstance(value, Gathered):
            raise DSPFormatError("gathered channels are read by something other than a convolution")
        if isinstance(value, Branch):
            made = self.joined([value], [range(value.weight.tensor.shape[0])], value.weight.tensor.shape[0])
        elif isinstance(value, Scatter):
            width = value.base.channels
            if width is None:
                raise DSPFormatError("branches are added into a tensor of unknown width")
            branch = self.joined(value.branches, value.places, width)
            made = Image(self.graph.call_function(torch.add, (value.base.node, branch.node)), width)
        else:
            raise DSPFormatError(f"a {type(value).__name__} stands where a tensor is expected")
        self._replace(value, made)
        return made

    def call(self, function: Callable[..., Any], value: Any, *arguments: Any) -> Image:
        """A function of one tensor that keeps its channels."""
        image = self.image(value)
        return Image(self.graph.call_function(function, (image.node, *arguments)), image.channels)

    def module(self, path: str, module: nn.Module, value: Any, channels: int | None) -> Image:
        """Put a module at a path and call it."""
        parent, name = self.root, path.rpartition(".")[2]
        for part in path.split(".")[:-1]:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        if name in parent._modules:
            raise DSPFormatError(f"layer {path!r} runs twice")
        parent.add_module(name, module)
        self.placed.add(path)
        return Image(self.graph.call_module(path, (self.image(value).node,)), channels)

    def _replace(self, old: Any, new: Any) -> None:
        for name, value in self.values.items():
            if value is old:
                self.values[name] = new

    def joined(self, branches: Sequence[Branch], places: Sequence[Sequence[int]], out_channels: int) -> Image:
        """One packed convolution, one norm and maybe a ReLU for branches of one source and one form."""
        first, path = branches[0], _joined_path([branch.weight.path for branch in branches])
        forms = {
            (id(b.source.node), b.settings, b.norm_settings, b.relu, b.norm is None, b.bias is None)
            for b in branches
        }
        kernels = {tuple(branch.weight.tensor.shape[2:]) for branch in branches}
        if len(forms) > 1 or len(kernels) > 1:
            raise DSPFormatError(
                f"the branches of {path!r} read different tensors or have different settings"
            )
        in_channels = first.source.channels
        if in_channels is None:
            in_channels = 1 + max((channel for branch in branches for channel in branch.index), default=0)
        try:
            structure = GroupStructure.build(
                in_channels,
                out_channels,
                [(b.index, tuple(p)) for b, p in zip(branches, places, strict=True)],
            )
            stride, padding, dilation = first.settings
            biased = first.bias is not None
            conv = PackedConv2d(structure, kernels.pop(), stride, padding, dilation, bias=biased)
        except DSPError as error:
            raise DSPFormatError(f"the branches of {path!r} do not fit together: {error}") from error
        with torch.no_grad():
            for branch, weight in zip(branches, conv.weights, strict=True):
                copy_state(weight, branch.weight)
            if conv.bias is not None:
                for branch, place in zip(branches, places, strict=True):
                    assert branch.bias is not None
                    conv.bias[list(place)] = branch.bias.tensor
        joined = self.module(path, conv, first.source, out_channels)
        if first.norm is not None:
            norm = nn.BatchNorm2d(out_channels, *first.norm_settings)
            # An absent channel is 0 before the norm and has to be 0 after it.
            for part, absent in (("weight", 0.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                getattr(norm, part).data.fill_(absent)
            for branch, place in zip(branches, places, strict=True):
                assert branch.norm is not None
                for part, tensor in zip(NORM, branch.norm, strict=True):
                    if tensor.tensor.shape != (len(place),):
                        raise DSPFormatError(f"{tensor.path} has shape {tuple(tensor.tensor.shape)}")
                    getattr(norm, part).data[list(place)] = tensor.tensor.detach()
            joined = self.module(_norm_path(path), norm, joined, out_channels)
        return self.call(torch.relu, joined) if first.relu else joined


NORM = ("weight", "bias", "running_mean", "running_var")


def _joined_path(paths: Sequence[str]) -> str:
    """``stage_1.0.conv_a`` for the branches ``stage_1.0.layers_a.{g}.0.weight``."""
    parts = [path.split(".") for path in paths]
    common = [column[0] for column in zip(*parts, strict=False) if len(set(column)) == 1]
    common = common[
        : next((n for n, column in enumerate(zip(*parts, strict=False)) if len(set(column)) > 1), None)
    ]
    if common and common[-1] == "weight":
        common.pop()
    while len(common) > 1 and common[-1].isdecimal():
        common.pop()
    return re.sub(r"layers_(\w+)$", r"conv_\1", ".".join(common)) or "conv"


def _norm_path(path: str) -> str:
    renamed = re.sub(r"conv_(\w+)$", r"bn_\1", path)
    return renamed if renamed != path else f"{path}_norm"


def copy_state(target: Tensor, source: State) -> None:
    """Fill a parameter from the archive's state. Raises DSPFormatError for another shape."""
    if target.shape != source.tensor.shape:
        raise DSPFormatError(
            f"{source.path} has shape {tuple(source.tensor.shape)}; expected {tuple(target.shape)}"
        )
    with torch.no_grad():
        target.copy_(source.tensor)


def _attribute(walk: Walk, operands: list[Any]) -> Any:
    owner, name = operands
    if not isinstance(owner, Owner):
        raise DSPFormatError(f"attribute {name!r} of something that is no module")
    path = f"{owner.path}.{name}" if owner.path else name
    return State(path, walk.state[path]) if path in walk.state else Owner(path)


def _index(value: Any, what: str) -> tuple[int, ...]:
    tensor = value.tensor if isinstance(value, State) else value
    if (
        not isinstance(tensor, Tensor)
        or tensor.is_floating_point()
        or tensor.numel() != max(tensor.shape, default=0)
    ):
        raise DSPFormatError(f"{what} is no list of channels")
    return tuple(tensor.flatten().tolist())


def _gather(walk: Walk, operands: list[Any]) -> Gathered:
    tensors = [o for o in operands if isinstance(o, Tensor | State)]
    if len(tensors) != 1 or 1 not in [o for o in operands if isinstance(o, int) and not isinstance(o, bool)]:
        raise DSPFormatError("channels are gathered in an unknown way")
    return Gathered(walk.image(operands[0]), _index(tensors[0], "an index to gather"))


def _convolution(walk: Walk, operands: list[Any]) -> Any:
    value, weight, bias, stride, padding, dilation = operands[:6]
    groups = operands[8] if len(operands) > 8 else (operands[6] if len(operands) > 6 else 1)
    transposed = len(operands) > 8 and operands[6]
    if not isinstance(weight, State) or weight.tensor.dim() != 4 or transposed:
        raise DSPFormatError("a convolution that is not two-dimensional, or whose weight is no parameter")
    settings = (tuple(stride), tuple(padding) if not isinstance(padding, str) else padding, tuple(dilation))
    if isinstance(value, Gathered) and groups == 1 and not isinstance(padding, str):
        if weight.tensor.shape[1] != len(value.index):
            raise DSPFormatError(
                f"{weight.path} reads {weight.tensor.shape[1]} of {len(value.index)} channels"
            )
        return Branch(value.source, value.index, weight, bias, settings)
    out_channels, in_channels, height, width = weight.tensor.shape
    kernel = (height, width)
    conv = nn.Conv2d(in_channels * groups, out_channels, kernel, *settings, groups, bias is not None)
    copy_state(conv.weight, weight)
    if conv.bias is not None:
        copy_state(conv.bias, bias)
    return walk.module(weight.path.rpartition(".")[0], conv, value, out_channels)


def _batch_norm(walk: Walk, operands: list[Any]) -> Any:
    value, *tensors = operands[:5]
    training, momentum, eps = operands[5:8]
    if training or not all(isinstance(tensor, State) for tensor in tensors):
        raise DSPFormatError("a batch norm in training mode, or without weight, bias and statistics")
    if isinstance(value, Branch) and value.norm is None and not value.relu:
        weight, bias, mean, variance = tensors
        return replace(value, norm=(weight, bias, mean, variance), norm_settings=(eps, momentum))
    norm = nn.BatchNorm2d(len(tensors[0].tensor), eps, momentum)
    for part, tensor in zip(NORM, tensors, strict=True):
        copy_state(getattr(norm, part), tensor)
    path = tensors[0].path.rpartition(".")[0]
    return walk.module(path, norm, value, len(tensors[0].tensor))


def _relu(walk: Walk, operands: list[Any]) -> Any:
    value = operands[0]
    if isinstance(value, Branch) and not value.relu:
        return replace(value, relu=True)
    return walk.call(torch.relu, value)


def _concat(walk: Walk, operands: list[Any]) -> Any:
    values, dim = operands
    if dim != 1 or not values:
        raise DSPFormatError(f"{len(values)} tensors are concatenated along dimension {dim}")
    if all(isinstance(value, Branch) for value in values):
        sizes = [value.weight.tensor.shape[0] for value in values]
        places = [range(sum(sizes[:n]), sum(sizes[: n + 1])) for n in range(len(sizes))]
        return walk.joined(values, places, sum(sizes))
    images = [walk.image(value) for value in values]
    widths = [image.channels for image in images]
    total = None if None in widths else sum(width for width in widths if width is not None)
    return Image(walk.graph.call_function(torch.cat, ([image.node for image in images], 1)), total)


def _index_add(walk: Walk, operands: list[Any]) -> Any:
    base, dim, index, branch = operands[:4]
    alpha = operands[4] if len(operands) > 4 else 1
    if dim != 1 or alpha != 1 or not isinstance(branch, Branch):
        raise DSPFormatError("index_add of something other than a branch, into other than channels")
    if not isinstance(base, Scatter):
        base = Scatter(walk.image(base), (), ())
    place = _index(index, "an index to add to")
    # Branches of other sources or forms would be another convolution.
    return replace(base, branches=(*base.branches, branch), places=(*base.places, place))


def _add(walk: Walk, operands: list[Any]) -> Any:
    left, right = operands[:2]
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left + right
    if (operands[2] if len(operands) > 2 else 1) != 1:
        raise DSPFormatError("an addition with a factor")
    images = walk.image(left), walk.image(right)
    return Image(walk.graph.call_function(torch.add, tuple(i.node for i in images)), images[0].channels)


def _max_pool(walk: Walk, operands: list[Any]) -> Any:
    walk.pooled = True
    value, *settings = operands
    return walk.call(F.max_pool2d, value, *(tuple(s) if isinstance(s, list) else s for s in settings))


def _reshape(walk: Walk, operands: list[Any]) -> Any:
    """A view that keeps the batch and flattens the rest."""
    if len(operands) != 2 or not isinstance(operands[1], list) or len(operands[1]) != 2:
        raise DSPFormatError(f"a view as {operands[1:]}")
    return walk.call(torch.flatten, operands[0], 1)


def _linear(walk: Walk, operands: list[Any]) -> Any:
    value, weight, bias = operands
    if not isinstance(weight, State) or weight.tensor.dim() != 2:
        raise DSPFormatError("a linear layer whose weight is no parameter")
    linear = nn.Linear(weight.tensor.shape[1], weight.tensor.shape[0], bias is not None)
    copy_state(linear.weight, weight)
    if bias is not None:
        copy_state(linear.bias, bias)
    return walk.module(weight.path.rpartition(".")[0], linear, value, weight.tensor.shape[0])


def _transposed(walk: Walk, operands: list[Any]) -> Any:
    if not isinstance(operands[0], State):
        raise DSPFormatError("a transposed tensor that is no parameter")
    return operands[0]  # only addmm reads it


def _size(walk: Walk, operands: list[Any]) -> Any:
    return -1 if operands[1] == 0 else math.nan  # the batch; other sizes are not needed


def _mean(walk: Walk, operands: list[Any]) -> Any:
    value, dims, keepdim = operands[:3]
    return Image(
        walk.graph.call_function(torch.mean, (walk.image(value).node, tuple(dims), bool(keepdim))), None
    )


HANDLERS: dict[str, Callable[[Walk, list[Any]], Any]] = {
    "prim::Constant": lambda walk, o: o[0],
    "prim::GetAttr": _attribute,
    "prim::ListConstruct": lambda walk, o: list(o),
    "prim::TupleConstruct": lambda walk, o: list(o),
    "prim::ListUnpack": lambda walk, o: o[0] if len(o[0]) > 1 else o[0][0],
    "prim::TupleUnpack": lambda walk, o: o[0] if len(o[0]) > 1 else o[0][0],
    "prim::NumToTensor": lambda walk, o: o[0],
    "aten::Int": lambda walk, o: o[0],
    "aten::size": _size,
    "aten::take_along_dim": _gather,
    "aten::index_select": _gather,
    "aten::_convolution": _convolution,
    "aten::conv2d": _convolution,
    "aten::batch_norm": _batch_norm,
    "aten::relu": _relu,
    "aten::cat": _concat,
    "aten::index_add": _index_add,
    "aten::add": _add,
    "aten::max_pool2d": _max_pool,
    "aten::adaptive_avg_pool2d": lambda walk, o: walk.call(F.adaptive_avg_pool2d, o[0], tuple(o[1])),
    "aten::avg_pool2d": lambda walk, o: walk.call(
        F.avg_pool2d, *(tuple(v) if isinstance(v, list) else v for v in o)
    ),
    "aten::mean": _mean,
    "aten::flatten": lambda walk, o: walk.call(torch.flatten, *o),
    "aten::view": _reshape,
    "aten::reshape": _reshape,
    "aten::squeeze": lambda walk, o: walk.call(torch.squeeze, *o),
    "aten::linear": _linear,
    "aten::t": _transposed,
    "aten::addmm": lambda walk, o: _linear(walk, [o[1], o[2], o[0]]),
    "aten::dropout": lambda walk, o: o[0],
    "aten::contiguous": lambda walk, o: o[0],
    "aten::detach": lambda walk, o: o[0],
}
