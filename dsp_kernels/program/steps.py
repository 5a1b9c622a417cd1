"""A fused network as data: steps that read and write named values. Planned once, run many times.

A Program says what is computed; an executor (``dsp_kernels.run.programs``) decides how.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Self

from torch import Tensor, fx, nn

from dsp_kernels.graph.size_check import SizeCheck
from dsp_kernels.op.spec import ConvSpec

TensorMap = Callable[[Tensor], Tensor]
# A Program that is ready to run: the tensors of its inputs -> the values of its outputs, in its order.
Runner = Callable[[Sequence[Tensor]], list[Any]]


def _map_tensors(value: Any, function: TensorMap) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, nn.Module):
        return copy.deepcopy(value)._apply(function)
    if isinstance(value, Step):
        return value.map_tensors(function)
    if isinstance(value, Requantize):
        return replace(value, multiplier=function(value.multiplier))
    return tuple(_map_tensors(part, function) for part in value) if type(value) is tuple else value


@dataclass(frozen=True, eq=False)
class Step:
    """Reads the values ``inputs`` and writes the value ``output``."""

    output: str
    inputs: tuple[str, ...]

    def map_tensors(self, function: TensorMap) -> Self:
        """A copy with ``function`` applied to every tensor and module of the step."""
        values = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: _map_tensors(value, function) for name, value in values.items()})

    def describe(self) -> str:
        """One line of ``explain()``."""
        return type(self).__name__.removesuffix("Step").lower() + _integers(getattr(self, "requantize", None))


@dataclass(frozen=True, eq=False)
class Requantize:
    """How a step of integers makes its output from an exact sum, see ``dsp_kernels/run/eager/integers.py``.

    All values are float32 that hold integers, and all arithmetic is float32, each operation rounded once.
    multiplier: of the sum, float32: (out_channels,) of a convolution or linear layer, (1,) of other steps; a
    pool divides it by its number of pixels. residual: factor of the residual, or of the second operand of an
    add; None: neither. low, high: limits of the output, which is rounded; infinite: the output is a real
    number, neither limited nor rounded. Finite limits hold the activation, and the step has "none".
    exact: the input has more levels than a byte, so few that every float32 sum of products is exact.
    signed: the input has the levels -128..127, otherwise 0..255.
    """

    multiplier: Tensor
    residual: float | None = None
    low: float = -math.inf
    high: float = math.inf
    exact: bool = False
    signed: bool = False

    def describe(self) -> str:
        """The levels of the input and of the output."""
        return f"{'exact' if self.exact else 's8' if self.signed else 'u8'} -> {levels(self.low, self.high)}"


def levels(low: float, high: float) -> str:
    """The name of integers in this range."""
    if math.isinf(high):
        return "float"
    return "u8" if low >= 0 and high <= 255 else "s8" if low >= -128 and high <= 127 else f"+-{high:g}"


@dataclass(frozen=True, eq=False)
class QuantizeStep(Step):
    """clamp(round(x * inverse), low, high), as float32; round is half to even."""

    inverse: float
    low: float
    high: float

    def describe(self) -> str:
        return f"to integers, {levels(self.low, self.high)}"


@dataclass(frozen=True, eq=False)
class DequantizeStep(Step):
    """x * scale."""

    scale: float

    def describe(self) -> str:
        return "to float"


@dataclass(frozen=True, eq=False)
class ConvStep(Step):
    """A gather-grouped convolution; inputs: (x,) or (x, residual).

    weights[g]: (O_g, C_g, kh, kw); bias: (out_channels,) or None; norms are folded in already.
    path: of the module. requantize: x and the weights are integers.
    """

    spec: ConvSpec
    weights: tuple[Tensor, ...]
    bias: Tensor | None
    path: str = ""
    requantize: Requantize | None = None

    def describe(self) -> str:
        spec = self.spec
        kernel = "x".join(map(str, spec.kernel_size))
        parts = [f"conv {kernel}", str(spec.structure)]
        parts += [f"stride {spec.stride[0]}"] if spec.stride != (1, 1) else []
        parts += ["+ bias"] if self.bias is not None else []
        parts += ["+ residual"] if len(self.inputs) == 2 else []
        return " ".join(parts) + _then(spec.activation) + _integers(self.requantize)


@dataclass(frozen=True, eq=False)
class ElementwiseStep(Step):
    """act(x * scale + shift) per channel, act(x + y), act(x * y) or act(x), by kind.

    kind: "affine" (a norm that follows no convolution; scale, shift: (channels,)), "add", "multiply" (equal
    shapes, or one is (batch, channels, 1, 1)) or "activation" (not folded into the step before).
    activation: for kind "activation" also a gate of ``activations.GATES``.
    """

    kind: str
    activation: str = "none"
    scale: Tensor | None = None
    shift: Tensor | None = None
    requantize: Requantize | None = None

    def describe(self) -> str:
        if self.kind == "activation":
            return self.activation
        return self.kind + _then(self.activation) + _integers(self.requantize)


@dataclass(frozen=True, eq=False)
class ConcatStep(Step):
    """The inputs concatenated along the channels."""


@dataclass(frozen=True, eq=False)
class SelectStep(Step):
    """Output channel c is input channel index[c]: a piece of a split, or a shuffle."""

    index: tuple[int, ...]

    def describe(self) -> str:
        return f"select {len(self.index)} channels"


@dataclass(frozen=True, eq=False)
class PoolStep(Step):
    """Pooling. kind: "max_pool", "avg_pool" or "adaptive_avg_pool"; settings: the function's arguments."""

    kind: str
    settings: Mapping[str, Any]
    requantize: Requantize | None = None  # of averages

    def describe(self) -> str:
        size = self.settings.get("kernel_size") or self.settings["output_size"]
        return f"{self.kind} {size}{_integers(self.requantize)}"


@dataclass(frozen=True, eq=False)
class ResizeStep(Step):
    """Larger, padded and cut maps.

    Each pixel becomes factor x factor equal ones; with shuffle, channels become pixels as by
    torch.pixel_shuffle; (batch, features) are maps of one pixel. pads: (top, bottom, left, right) pixels of
    ``value`` around, cut where negative.
    """

    factor: int = 1
    shuffle: bool = False
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    value: float = 0.0

    def describe(self) -> str:
        spread = [f"{'shuffle' if self.shuffle else 'repeat'} {self.factor}"] if self.factor > 1 else []
        return " + ".join(spread + [f"pad {self.pads}"] * any(self.pads))


@dataclass(frozen=True, eq=False)
class FitStep(Step):
    """A map as large as a second input, or of ``size``, or ``factor`` times as large; inputs: (x[, like]).

    kind: interpolation "nearest", "bilinear" or "corners" (bilinear, align_corners), or zeros after the last
    row and column ("pad_end") or on both sides ("pad_around"); rows and columns that are too many are cut.
    """

    kind: str
    size: tuple[int, int] | None = None
    factor: int = 1

    def describe(self) -> str:
        return f"{self.kind} {'like another map' if len(self.inputs) == 2 else self.size or self.factor}"


@dataclass(frozen=True, eq=False)
class NormStep(Step):
    """act((x - mean) / sqrt(variance + eps) * scale + shift), by image and group of channels.

    Mean and variance are over all channels and pixels of each of ``groups`` equal groups; scale, shift:
    (channels,).
    """

    groups: int
    eps: float
    scale: Tensor
    shift: Tensor
    activation: str = "none"

    def describe(self) -> str:
        return f"norm of {self.groups} groups{_then(self.activation)}"


@dataclass(frozen=True, eq=False)
class GlobalPoolStep(Step):
    """The mean of every channel; (batch, channels, 1, 1) if keepdim, else (batch, channels)."""

    keepdim: bool
    requantize: Requantize | None = None


@dataclass(frozen=True, eq=False)
class FlattenStep(Step):
    """(batch, channels, height, width) -> (batch, channels * height * width)."""


@dataclass(frozen=True, eq=False)
class LinearStep(Step):
    """act(x weight^T + bias); weight: (out_features, in_features), bias: (out_features,) or None."""

    weight: Tensor
    bias: Tensor | None
    activation: str = "none"
    path: str = ""
    requantize: Requantize | None = None

    def describe(self) -> str:
        return f"linear {self.weight.shape[1]}->{self.weight.shape[0]}{_integers(self.requantize)}"


def _then(activation: str) -> str:
    return "" if activation == "none" else f" + {activation}"


def _integers(requantize: Requantize | None) -> str:
    return "" if requantize is None else f", integers {requantize.describe()}"


@dataclass(frozen=True)
class ValueRef:
    """A value among the arguments of a TorchStep."""

    name: str


@dataclass(frozen=True, eq=False)
class TorchStep(Step):
    """An operation without a step of its own, run as the model ran it.

    operation, target, args, kwargs: as of an fx.Node, with ValueRef for the nodes; held: the module or tensor
    of call_module and get_attr; why: the reason, for ``explain()``.
    """

    operation: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    held: nn.Module | Tensor | None
    why: str

    def describe(self) -> str:
        name = type(self.held).__name__ if isinstance(self.held, nn.Module) else self.target
        return f"plain PyTorch: {getattr(name, '__name__', name)} ({self.why})"

    def run(self, values: Mapping[str, Any]) -> Any:
        """The result; values: by name."""
        if self.operation == "get_attr":
            return self.held

        def argument(a: Any) -> Any:
            return values[a.name] if isinstance(a, ValueRef) else a

        args: Any = fx.node.map_aggregate(self.args, argument)
        kwargs: Any = fx.node.map_aggregate(dict(self.kwargs), argument)
        if self.operation == "call_function":
            return self.target(*args, **kwargs)
        if self.operation == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        assert isinstance(self.held, nn.Module)
        return self.held(*args, **kwargs)


def map_nested(function: Callable[[Any], Any], nested: Any) -> Any:
    """Nested tuples, lists and dicts with ``function`` applied to everything that they hold."""
    if isinstance(nested, dict):
        return {key: map_nested(function, part) for key, part in nested.items()}
    if not isinstance(nested, list | tuple):
        return function(nested)
    parts = [map_nested(function, part) for part in nested]
    if isinstance(nested, list):
        return parts
    return type(nested)(*parts) if hasattr(nested, "_fields") else type(nested)(parts)


@dataclass(frozen=True, eq=False)
class Program:
    """The steps of a network in the order in which they run; immutable.

    inputs: names of the tensors that forward() takes, in its order; outputs: of the results, in the order in
    which they are made. answer: what forward() returns: a ValueRef to an output, or nested tuples, lists and
    dicts of those and of constants. shapes: shape of every tensor for the example input, batch first.
    check: of the sizes of the first input that it is right for, None for all; FusedNetwork calls it.
    notes: of a quantised network, value -> why the step that makes it computes in float.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    answer: Any
    steps: tuple[Step, ...]
    shapes: Mapping[str, tuple[int, ...]]
    check: SizeCheck | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_integer(self) -> bool:
        """Whether some values are integers, held in float32."""
        return any(isinstance(step, QuantizeStep) for step in self.steps)

    @property
    def last_use(self) -> Mapping[str, int]:
        """Value -> the last step that writes or reads it; for an output, the number of steps."""
        last = dict.fromkeys(self.inputs, -1)
        for position, step in enumerate(self.steps):
            last.update(dict.fromkeys((*step.inputs, step.output), position))
        return last | dict.fromkeys(self.outputs, len(self.steps))

    @property
    def dying(self) -> tuple[tuple[str, ...], ...]:
        """Per step, the values that can be freed after it."""
        dead: list[list[str]] = [[] for _ in self.steps]
        for name, end in self.last_use.items():
            if 0 <= end < len(dead):
                dead[end].append(name)
        return tuple(map(tuple, dead))

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions and linear layers for one image of the example's size."""
        total = 0
        for step in self.steps:
            if isinstance(step, ConvStep):
                height, width = self.shapes[step.output][2:]
                total += step.spec.structure.macs(step.spec.kernel_size, (height, width))
            elif isinstance(step, LinearStep):
                total += step.weight.numel()
        return total

    def map_tensors(self, function: TensorMap) -> Program:
        """A copy with ``function`` applied to every tensor: another device or dtype."""
        return replace(self, steps=tuple(step.map_tensors(function) for step in self.steps))


# Steps whose result has the size of what they read.
_SIZE_KEEPING = (ElementwiseStep, NormStep, ConcatStep, FlattenStep, SelectStep, QuantizeStep, DequantizeStep)


def is_activation(step: Step) -> bool:
    """Whether it is an elementwise function of one tensor, without parameters."""
    if isinstance(step, ElementwiseStep):
        return step.kind == "activation"
    return isinstance(step, QuantizeStep | DequantizeStep)


class Flattened(NamedTuple):
    """maps: flattened feature maps, and elementwise functions of them. derived: whatever else reads them."""

    maps: set[str]
    derived: set[str]


def flattened_maps(steps: Sequence[Step], shapes: Mapping[str, tuple[int, ...]]) -> Flattened:
    """The (batch, features) values whose number of features depends on the size of the image.

    The shapes of the example do not tell: its maps may be single pixels where those of a larger image are
    not. Only a global pool makes single pixels for every size, and only a linear layer ends the dependence.
    """
    pixels: set[str] = set()
    maps: set[str] = set()
    derived: set[str] = set()
    for step in steps:
        keeps_size = isinstance(step, _SIZE_KEEPING)
        flattens = isinstance(step, FlattenStep) and len(shapes[step.inputs[0]]) == 4
        is_global = isinstance(step, PoolStep) and step.settings.get("output_size") == (1, 1)
        if is_global or isinstance(step, GlobalPoolStep) or (keeps_size and pixels.issuperset(step.inputs)):
            pixels.add(step.output)
        elif flattens or (is_activation(step) and maps.issuperset(step.inputs)):
            maps.add(step.output)
        elif (keeps_size or isinstance(step, TorchStep)) and not (maps | derived).isdisjoint(step.inputs):
            derived.add(step.output)
    return Flattened(maps, derived)
