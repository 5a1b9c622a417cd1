"""From the calls of a traced network of branches to a packed network.

The walk follows data, not module names. A branch gathers channels, convolves them, and may normalise and
apply ReLU; branches that are concatenated, or added into one tensor at given channels, become one packed
convolution.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPFormatError
from dsp_kernels.file.decode import LoadedNetwork
from dsp_pruning.released.branches import NORM, Branch, NamedTensor, copy_into, joined_conv, joined_norm


@dataclass(frozen=True)
class _Image:
    """A tensor of the network: the node that makes it, and its channels where they are known."""

    node: fx.Node
    channels: int | None


@dataclass(frozen=True)
class _Gathered:
    source: _Image
    index: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class _Branch(Branch):
    """settings: stride, padding, dilation; norm_settings: eps, momentum."""

    source: _Image
    settings: tuple[Any, ...]
    norm_settings: tuple[float, float] = (1e-5, 0.1)
    relu: bool = False


@dataclass(frozen=True)
class _Scatter:
    """A tensor and branches that are added into it, each at the channels of its list."""

    base: _Image
    branches: tuple[_Branch, ...] = ()
    places: tuple[tuple[int, ...], ...] = ()


def packed_network(graph: Any, state: Mapping[str, Tensor]) -> LoadedNetwork:
    """The network of ``read_archive``. Raises DSPFormatError for calls that no released network holds."""
    walk = _Walk(graph, state)
    for node in graph.nodes():
        walk.step(node)
    return walk.network(*_names(graph.outputs()))


class _Walk:
    def __init__(self, graph: Any, state: Mapping[str, Tensor]) -> None:
        self.state = state
        self.graph = fx.Graph()
        self.root = fx.GraphModule(nn.Module(), self.graph)
        self.placed: set[str] = set()
        self.pooled = False
        network, images = _names(graph.inputs())
        self.values: dict[str, Any] = {network: "", images: _Image(self.graph.placeholder("x"), None)}

    def step(self, call: Any) -> None:
        """Follow a ``torch._C.Node``."""
        kind, outputs = call.kind(), _names(call.outputs())
        if list(call.blocks()):
            raise DSPFormatError(f"{kind} is control flow; expected the archive of a traced network")
        handler = _HANDLERS.get(kind.removesuffix("_"))
        if handler is None:
            raise DSPFormatError(f"{kind} is not known here")
        operands = [self.values[name] for name in _names(call.inputs())]
        if kind == "prim::Constant":
            operands.append(call.output().toIValue())
        elif kind == "prim::GetAttr":
            operands.append(call.s("name"))
        try:
            result = handler(self, *operands)
            made = dict(zip(outputs, [result] if len(outputs) == 1 else result, strict=True))
        except DSPFormatError:
            raise
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            raise DSPFormatError(f"{kind} has operands that do not fit: {error}") from error
        if kind.endswith("_"):  # in place: later readers of the operand read the result
            self._replace(operands[0], result)
        self.values |= made

    def network(self, output: str) -> LoadedNetwork:
        """The packed network whose output is the value of this name."""
        self.graph.output(self.image(self.values[output]).node)
        self.graph.eliminate_dead_code()  # of a block that was removed by pruning, for example
        self.root.delete_all_unused_submodules()
        first = next((m for m in self.root.modules() if isinstance(m, nn.Conv2d | PackedConv2d)), None)
        if first is None:
            raise DSPFormatError("it holds no convolution")
        size = 224 if self.pooled else 32
        return LoadedNetwork(self.root, self.graph, ((1, first.in_channels, size, size),))

    def image(self, value: Any) -> _Image:
        """The tensor itself; branches are joined first."""
        if isinstance(value, _Image):
            return value
        if isinstance(value, _Gathered):
            raise DSPFormatError("gathered channels are read by something other than a convolution")
        if isinstance(value, _Branch):
            made = self.joined([value], [range(value.filters)], value.filters)
        elif isinstance(value, _Scatter):
            width = value.base.channels
            if width is None:
                raise DSPFormatError("branches are added into a tensor of unknown width")
            branch = self.joined(value.branches, value.places, width)
            made = _Image(self.graph.call_function(torch.add, (value.base.node, branch.node)), width)
        else:
            raise DSPFormatError(f"an operand is a {type(value).__name__}; expected a tensor")
        self._replace(value, made)
        return made

    def call(self, function: Callable[..., Any], value: Any, *arguments: Any) -> _Image:
        """A function of one tensor that keeps its channels."""
        image = self.image(value)
        arguments = tuple(tuple(a) if isinstance(a, list) else a for a in arguments)
        return _Image(self.graph.call_function(function, (image.node, *arguments)), image.channels)

    def module(self, path: str, module: nn.Module, value: Any, channels: int | None) -> _Image:
        """Add a module at a path and call it."""
        if path in self.placed or not self.root.add_submodule(path, module):
            raise DSPFormatError(f"layer {path!r} runs twice, or its path is taken")
        self.placed.add(path)
        return _Image(self.graph.call_module(path, (self.image(value).node,)), channels)

    def _replace(self, old: Any, new: Any) -> None:
        for name, value in self.values.items():
            if value is old:
                self.values[name] = new

    def joined(
        self, branches: Sequence[_Branch], places: Sequence[Sequence[int]], out_channels: int
    ) -> _Image:
        """One packed convolution, and one norm and ReLU where the branches have them."""
        first, path = branches[0], _joined_path([branch.weight.name for branch in branches])
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
        widths = in_channels, out_channels
        conv = joined_conv(path, branches, places, widths, kernels.pop(), *first.settings)
        made = self.module(path, conv, first.source, out_channels)
        if first.norm is not None:
            norm = joined_norm(branches, places, out_channels, *first.norm_settings)
            renamed = re.sub(r"conv_(\w+)$", r"bn_\1", path)
            made = self.module(renamed if renamed != path else f"{path}_norm", norm, made, out_channels)
        return self.call(torch.relu, made) if first.relu else made


def _names(values: Iterable[Any]) -> list[str]:
    return [value.debugName() for value in values]


def _joined_path(paths: Sequence[str]) -> str:
    """``stage_1.0.conv_a`` for the branches ``stage_1.0.layers_a.{g}.0.weight``."""
    columns = zip(*(path.split(".") for path in paths), strict=False)
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, columns)]
    if common and common[-1] == "weight":
        common.pop()
    while len(common) > 1 and common[-1].isdecimal():
        common.pop()
    return re.sub(r"layers_(\w+)$", r"conv_\1", ".".join(common)) or "conv"


def _index(value: Any) -> tuple[int, ...]:
    tensor = value.tensor if isinstance(value, NamedTensor) else value
    plain = isinstance(tensor, Tensor) and not tensor.is_floating_point()
    if not plain or tensor.numel() != max(tensor.shape, default=0):
        raise DSPFormatError("an index tensor is no list of channels")
    return tuple(tensor.flatten().tolist())


def _attribute(walk: _Walk, owner: str, name: str) -> str | NamedTensor:
    """A tensor of the network, or the path of a module."""
    path = f"{owner}.{name}" if owner else name
    return NamedTensor(path, walk.state[path]) if path in walk.state else path


def _gather(walk: _Walk, value: Any, *operands: Any) -> _Gathered:
    """take_along_dim(x, index, 1) or index_select(x, 1, index)."""
    tensors = [o for o in operands if isinstance(o, Tensor | NamedTensor)]
    if len(tensors) != 1 or 1 not in [o for o in operands if isinstance(o, int) and not isinstance(o, bool)]:
        raise DSPFormatError("channels are gathered in an unknown way")
    return _Gathered(walk.image(value), _index(tensors[0]))


def _conv2d(
    walk: _Walk,
    value: Any,
    weight: Any,
    bias: Any,
    stride: list[int],
    padding: list[int] | str,
    dilation: list[int],
    groups: int = 1,
) -> _Image | _Branch:
    out_channels, in_channels, height, width = weight.tensor.shape
    settings: tuple[Any, ...]
    settings = (tuple(stride), padding if isinstance(padding, str) else tuple(padding), tuple(dilation))
    if isinstance(value, _Gathered) and groups == 1 and not isinstance(padding, str):
        if in_channels != len(value.index):
            raise DSPFormatError(f"{weight.name} reads {in_channels} of {len(value.index)} channels")
        return _Branch(value.index, weight, bias, source=value.source, settings=settings)
    conv = nn.Conv2d(in_channels * groups, out_channels, (height, width), *settings, groups, bias is not None)
    return _with_weights(walk, conv, value, weight, bias)


def _convolution(walk: _Walk, *operands: Any) -> _Image | _Branch:
    """aten::_convolution: conv2d with transposed, output_padding before groups, and flags after."""
    if operands[6]:
        raise DSPFormatError("a transposed convolution")
    return _conv2d(walk, *operands[:6], groups=operands[8])  # type: ignore[misc]


def _linear(walk: _Walk, value: Any, weight: Any, bias: Any) -> _Image:
    out_features, in_features = weight.tensor.shape
    linear = nn.Linear(in_features, out_features, bias is not None)
    return _with_weights(walk, linear, value, weight, bias)


def _with_weights(
    walk: _Walk, layer: nn.Conv2d | nn.Linear, value: Any, weight: NamedTensor, bias: NamedTensor | None
) -> _Image:
    copy_into(layer.weight, weight)
    if bias is not None and layer.bias is not None:
        copy_into(layer.bias, bias)
    return walk.module(weight.name.rpartition(".")[0], layer, value, len(weight.tensor))


def _batch_norm(walk: _Walk, value: Any, *operands: Any) -> _Image | _Branch:
    tensors, (training, momentum, eps) = operands[:4], operands[4:7]
    if training or not all(isinstance(tensor, NamedTensor) for tensor in tensors):
        raise DSPFormatError("a batch norm in training mode, or without weight, bias and statistics")
    if isinstance(value, _Branch) and value.norm is None and not value.relu:
        return replace(value, norm=tensors, norm_settings=(eps, momentum))
    norm = nn.BatchNorm2d(len(tensors[0].tensor), eps, momentum)
    for part, tensor in zip(NORM, tensors, strict=True):
        copy_into(getattr(norm, part), tensor)
    return walk.module(tensors[0].name.rpartition(".")[0], norm, value, norm.num_features)


def _relu(walk: _Walk, value: Any) -> _Image | _Branch:
    if isinstance(value, _Branch) and not value.relu:
        return replace(value, relu=True)
    return walk.call(torch.relu, value)


def _concat(walk: _Walk, values: list[Any], dim: int) -> _Image:
    if dim != 1 or not values:
        raise DSPFormatError(f"{len(values)} tensors are concatenated along dimension {dim}")
    if all(isinstance(value, _Branch) for value in values):
        total = sum(value.filters for value in values)
        places = torch.arange(total).split([value.filters for value in values])
        return walk.joined(values, [place.tolist() for place in places], total)
    images = [walk.image(value) for value in values]
    widths = [image.channels for image in images]
    channels = None if None in widths else sum(width for width in widths if width is not None)
    return _Image(walk.graph.call_function(torch.cat, ([image.node for image in images], 1)), channels)


def _index_add(walk: _Walk, base: Any, dim: int, index: Any, branch: Any, alpha: float = 1) -> _Scatter:
    if dim != 1 or alpha != 1 or not isinstance(branch, _Branch):
        raise DSPFormatError("index_add of something other than a branch, or not into channels")
    if not isinstance(base, _Scatter):
        base = _Scatter(walk.image(base))
    return replace(base, branches=(*base.branches, branch), places=(*base.places, _index(index)))


def _add(walk: _Walk, left: Any, right: Any, alpha: float = 1) -> Any:
    if isinstance(left, int | float) and isinstance(right, int | float):
        return left + right
    if alpha != 1:
        raise DSPFormatError("an addition with a factor")
    images = walk.image(left), walk.image(right)
    return _Image(walk.graph.call_function(torch.add, tuple(i.node for i in images)), images[0].channels)


def _call(function: Callable[..., Any], walk: _Walk, value: Any, *operands: Any) -> _Image:
    return walk.call(function, value, *operands)


def _max_pool(walk: _Walk, value: Any, *settings: Any) -> _Image:
    walk.pooled = True
    return walk.call(F.max_pool2d, value, *settings)


def _mean(walk: _Walk, value: Any, dims: list[int], keepdim: bool, *_: Any) -> _Image:
    return replace(walk.call(torch.mean, value, dims, bool(keepdim)), channels=None)


def _reshape(walk: _Walk, value: Any, shape: Any) -> _Image:
    """A view that keeps the batch and flattens the rest."""
    if not isinstance(shape, list) or len(shape) != 2:
        raise DSPFormatError(f"a view as {shape}")
    return walk.call(torch.flatten, value, 1)


def _items(walk: _Walk, values: list[Any]) -> Any:
    return values if len(values) > 1 else values[0]


_SAME = (
    "prim::Constant",
    "prim::NumToTensor",
    "aten::Int",
    "aten::dropout",
    "aten::contiguous",
    "aten::detach",
    "aten::t",  # only addmm reads it
)
_PLAIN = (F.adaptive_avg_pool2d, F.avg_pool2d, torch.flatten, torch.squeeze)
_HANDLERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_SAME, lambda walk, value, *_: value),
    **{f"aten::{function.__name__}": partial(_call, function) for function in _PLAIN},
    "prim::GetAttr": _attribute,
    **dict.fromkeys(("prim::ListConstruct", "prim::TupleConstruct"), lambda walk, *values: list(values)),
    **dict.fromkeys(("prim::ListUnpack", "prim::TupleUnpack"), _items),
    "aten::size": lambda walk, value, dim: -1 if dim == 0 else math.nan,  # only the batch is needed
    **dict.fromkeys(("aten::take_along_dim", "aten::index_select"), _gather),
    "aten::_convolution": _convolution,
    "aten::conv2d": _conv2d,
    "aten::batch_norm": _batch_norm,
    "aten::relu": _relu,
    "aten::cat": _concat,
    "aten::index_add": _index_add,
    "aten::add": _add,
    "aten::max_pool2d": _max_pool,
    "aten::mean": _mean,
    **dict.fromkeys(("aten::view", "aten::reshape"), _reshape),
    "aten::linear": _linear,
    "aten::addmm": lambda walk, bias, value, weight, *_: _linear(walk, value, weight, bias),
}
