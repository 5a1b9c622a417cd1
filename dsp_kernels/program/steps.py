"""A fused network as data: values, and the steps that make them. Built once, run many times.

A step names the values that it reads and the one that it writes. Executors (``dsp_kernels.run.programs``)
decide how a step runs; a Program only says what has to be computed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, fx, nn

from dsp_kernels.op.spec import ConvSpec

__all__ = [
    "ActivationStep",
    "AdaptivePoolStep",
    "AddStep",
    "AffineStep",
    "ConcatStep",
    "ConvStep",
    "FlattenStep",
    "Flattened",
    "GateStep",
    "GlobalPoolStep",
    "LinearStep",
    "MulStep",
    "PoolStep",
    "Program",
    "SelectStep",
    "Step",
    "TorchStep",
    "ValueRef",
    "flattened_maps",
]

TensorMap = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Step:
    """Reads the values ``inputs`` and writes the value ``output``."""

    output: str
    inputs: tuple[str, ...]

    def map_tensors(self, function: TensorMap) -> Step:
        """The same step with every tensor that it holds replaced by ``function`` of it."""
        return self

    def describe(self) -> str:
        """One line of ``explain()``."""
        return type(self).__name__.removesuffix("Step").lower()


@dataclass(frozen=True, eq=False)
class ConvStep(Step):
    """A gather-grouped convolution; inputs: (x,) or (x, residual).

    weights[g]: (O_g, C_g, kh, kw); bias: (out_channels,) or None; norms are folded in already.
    """

    spec: ConvSpec
    weights: tuple[Tensor, ...]
    bias: Tensor | None

    def map_tensors(self, function: TensorMap) -> ConvStep:
        weights = tuple(function(weight) for weight in self.weights)
        return replace(self, weights=weights, bias=None if self.bias is None else function(self.bias))

    def describe(self) -> str:
        spec = self.spec
        kernel = "x".join(map(str, spec.kernel_size))
        parts = [f"conv {kernel}", str(spec.structure)]
        parts += [f"stride {spec.stride[0]}"] if spec.stride != (1, 1) else []
        parts += ["+ bias"] if self.bias is not None else []
        parts += ["+ residual"] if len(self.inputs) == 2 else []
        parts += [f"+ {spec.activation}"] if spec.activation != "none" else []
        return " ".join(parts)


@dataclass(frozen=True, eq=False)
class AffineStep(Step):
    """act(x * scale + shift) per channel: a norm after no convolution. scale, shift: (channels,)."""

    scale: Tensor
    shift: Tensor
    activation: str = "none"

    def map_tensors(self, function: TensorMap) -> AffineStep:
        return replace(self, scale=function(self.scale), shift=function(self.shift))


@dataclass(frozen=True, eq=False)
class AddStep(Step):
    """act(inputs[0] + inputs[1])."""

    activation: str = "none"


@dataclass(frozen=True, eq=False)
class ActivationStep(Step):
    """An activation that could not be folded into what it follows."""

    activation: str


@dataclass(frozen=True, eq=False)
class GateStep(Step):
    """A function that changes 0, so that no convolution can end in it. kind: of ``activations.GATES``."""

    kind: str

    def describe(self) -> str:
        return self.kind


@dataclass(frozen=True, eq=False)
class MulStep(Step):
    """act(inputs[0] * inputs[1]), of one shape, or one of them (batch, channels, 1, 1)."""

    activation: str = "none"

    def describe(self) -> str:
        return "multiply" + (f" + {self.activation}" if self.activation != "none" else "")


@dataclass(frozen=True, eq=False)
class ConcatStep(Step):
    """The inputs one after the other along the channels."""


@dataclass(frozen=True, eq=False)
class SelectStep(Step):
    """Channel index[c] of the input as channel c: a part of a split, or a shuffle."""

    index: tuple[int, ...]

    def describe(self) -> str:
        return f"select {len(self.index)} channels"


@dataclass(frozen=True, eq=False)
class PoolStep(Step):
    """Max or average pooling. kind: "max_pool" or "avg_pool"; settings: keyword arguments of the function."""

    kind: str
    settings: Mapping[str, Any]

    def describe(self) -> str:
        return f"{self.kind} {self.settings['kernel_size']}"


@dataclass(frozen=True, eq=False)
class GlobalPoolStep(Step):
    """The mean of every map; (batch, channels, 1, 1) if keepdim, else (batch, channels)."""

    keepdim: bool


@dataclass(frozen=True, eq=False)
class AdaptivePoolStep(Step):
    """The mean of each of size[0] x size[1] parts of the map, cut as PyTorch cuts them."""

    size: tuple[int, int]

    def describe(self) -> str:
        return f"adaptive average pool to {self.size[0]}x{self.size[1]}"


@dataclass(frozen=True, eq=False)
class FlattenStep(Step):
    """(batch, channels, height, width) -> (batch, channels * height * width)."""


@dataclass(frozen=True, eq=False)
class LinearStep(Step):
    """act(x weight^T + bias); weight: (out_features, in_features), bias: (out_features,) or None."""

    weight: Tensor
    bias: Tensor | None
    activation: str = "none"

    def map_tensors(self, function: TensorMap) -> LinearStep:
        bias = None if self.bias is None else function(self.bias)
        return replace(self, weight=function(self.weight), bias=bias)

    def describe(self) -> str:
        return f"linear {self.weight.shape[1]}->{self.weight.shape[0]}"


@dataclass(frozen=True)
class ValueRef:
    """Stands for a value inside the arguments of a TorchStep."""

    name: str


@dataclass(frozen=True, eq=False)
class TorchStep(Step):
    """An operation that the Program does not know, run as the model ran it.

    operation: call_function, call_method, call_module or get_attr, with fx's target, args and kwargs in
    which ValueRef stands for values; held: the module or tensor for the last two; why: why it is here.
    """

    operation: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    held: nn.Module | Tensor | None
    why: str

    def map_tensors(self, function: TensorMap) -> TorchStep:
        if isinstance(self.held, nn.Module):
            return replace(self, held=copy.deepcopy(self.held)._apply(function))
        return self if self.held is None else replace(self, held=function(self.held))

    def describe(self) -> str:
        name = type(self.held).__name__ if isinstance(self.held, nn.Module) else self.target
        return f"plain PyTorch: {getattr(name, '__name__', name)} ({self.why})"

    def run(self, values: Mapping[str, Any]) -> Any:
        """The result, reading values by name."""
        if self.operation == "get_attr":
            return self.held
        args = fx.node.map_aggregate(self.args, lambda a: values[a.name] if isinstance(a, ValueRef) else a)
        kwargs = {
            key: fx.node.map_aggregate(value, lambda a: values[a.name] if isinstance(a, ValueRef) else a)
            for key, value in self.kwargs.items()
        }
        assert isinstance(args, tuple)
        if self.operation == "call_function":
            return self.target(*args, **kwargs)
        if self.operation == "call_method":
            return getattr(args[0], self.target)(*args[1:], **kwargs)
        assert isinstance(self.held, nn.Module)
        return self.held(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class Program:
    """The steps of a network in order.

    input: (batch, channels, height, width) value; output: value that the network returns.
    shapes: the shape of each tensor value for the example input, batch first.
    """

    input: str
    output: str
    steps: tuple[Step, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @cached_property
    def last_use(self) -> Mapping[str, int]:
        """Per value, the last step that makes or reads it; the output lives beyond all steps."""
        last = {self.input: -1}
        for position, step in enumerate(self.steps):
            last.update(dict.fromkeys((*step.inputs, step.output), position))
        last[self.output] = len(self.steps)
        return last

    @cached_property
    def dying(self) -> tuple[tuple[str, ...], ...]:
        """Per step, the values that nothing reads after it, so that an executor can free them."""
        dead: list[list[str]] = [[] for _ in self.steps]
        for name, end in self.last_use.items():
            if 0 <= end < len(dead):
                dead[end].append(name)
        return tuple(map(tuple, dead))

    @cached_property
    def macs(self) -> int:
        """Multiply-adds of all convolutions and linear layers for one image of the example's size."""
        total = 0
        for step in self.steps:
            if isinstance(step, ConvStep):
                height, width = self.shapes[step.output][2:]
                total += step.spec.structure.macs(step.spec.kernel_size, (height, width))
            elif isinstance(step, LinearStep):
                total += step.weight.numel()
        return total

    def map_tensors(self, function: TensorMap) -> Program:
        """The same Program with every tensor replaced by ``function`` of it: another device or dtype."""
        return replace(self, steps=tuple(step.map_tensors(function) for step in self.steps))


_OF_ITS_INPUTS_SIZE = (
    ActivationStep,
    AddStep,
    AffineStep,
    ConcatStep,
    FlattenStep,
    GateStep,
    MulStep,
    SelectStep,
)


class Flattened(NamedTuple):
    """maps: values that hold a map's planes one after the other. derived: what other steps make of them."""

    maps: set[str]
    derived: set[str]


def flattened_maps(steps: Sequence[Step], shapes: Mapping[str, tuple[int, ...]]) -> Flattened:
    """The values whose features are as many as a map's numbers, for this or another image.

    The example cannot tell: its map may be a single pixel where a larger image's is not. Only a global pool
    makes single pixels of every image, and only a linear layer has a number of features of its own.
    """
    pixels: set[str] = set()
    found = Flattened(set(), set())
    for step in steps:
        if _is_pixel(step, pixels):
            pixels.add(step.output)
        elif _is_map(step, found.maps, shapes):
            found.maps.add(step.output)
        elif _is_derived(step, found):
            found.derived.add(step.output)
    return found


def _is_pixel(step: Step, pixels: set[str]) -> bool:
    if isinstance(step, AdaptivePoolStep):
        return step.size == (1, 1)
    if isinstance(step, GlobalPoolStep):
        return True
    return isinstance(step, _OF_ITS_INPUTS_SIZE) and pixels.issuperset(step.inputs)


def _is_map(step: Step, maps: set[str], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    if isinstance(step, FlattenStep):
        return len(shapes[step.inputs[0]]) == 4
    return isinstance(step, (ActivationStep, GateStep)) and maps.issuperset(step.inputs)


def _is_derived(step: Step, found: Flattened) -> bool:
    reads = not (found.maps | found.derived).isdisjoint(step.inputs)
    return reads and isinstance(step, (*_OF_ITS_INPUTS_SIZE, TorchStep))
