"""The eager executor: a Program in plain PyTorch, channels_last, on any device."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_kernels.op.activations import activate, activate_
from dsp_kernels.program import steps
from dsp_kernels.program.steps import Program, Runner, Step, TorchStep
from dsp_kernels.run.eager.conv import EagerBackend, form_of
from dsp_kernels.run.eager.integers import computes_in_integers, integer_call

_LARGEST_VALUE = 4 << 20  # bytes of one value at which the batch is split, see _batch_limit


class EagerExecutor:
    """Every step is one or a few PyTorch calls; a value is freed after its last reader."""

    name = "eager"
    takes_any_dtype = False

    def can_run(self, program: Program, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        if program.is_integer and dtype != torch.float32:
            return False, f"dtype {dtype} cannot hold the values of an integer network; float32 does"
        return (True, "") if dtype.is_floating_point else (False, f"dtype {dtype} is not a floating dtype")

    def prepare(self, program: Program) -> Runner:
        calls = [(step, self.call(step)) for step in program.steps]
        dying = program.dying

        def run(inputs: Sequence[Tensor]) -> list[Any]:
            # Convolutions are fastest in channels_last: measured 1.2-1.6x on the released networks.
            values: dict[str, Any] = {
                name: x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
                for name, x in zip(program.inputs, inputs, strict=True)
            }
            for (step, call), dead in zip(calls, dying, strict=True):
                values[step.output] = call(values)
                for name in dead:
                    values.pop(name, None)
            return [values[name] for name in program.outputs]

        limit = _batch_limit(program)

        def run_in_parts(inputs: Sequence[Tensor]) -> list[Any]:
            if limit is None or inputs[0].shape[0] <= limit or inputs[0].device.type != "cpu":
                return run(inputs)
            parts = [run(part) for part in zip(*(x.split(limit) for x in inputs), strict=True)]
            return [torch.cat(results) for results in zip(*parts, strict=True)]

        return run_in_parts

    def is_native(self, program: Program) -> bool:
        return False

    def describe(self, program: Program, verbose: bool = False) -> list[str]:
        """The form of each convolution; empty for other steps."""
        return [form_of(step.spec) if isinstance(step, steps.ConvStep) else "" for step in program.steps]

    def call(self, step: Step) -> Callable[[dict[str, Any]], Any]:
        """A function from the values computed so far to the step's result."""
        if computes_in_integers(step):
            return integer_call(step)
        if isinstance(step, steps.ConvStep):
            convolve = EagerBackend().prepare(step.spec, step.weights, step.bias)
            x, residual = step.inputs[0], step.inputs[1] if len(step.inputs) == 2 else None
            return lambda values: convolve(values[x], None if residual is None else values[residual])
        if isinstance(step, steps.ElementwiseStep):
            return elementwise(step)
        if isinstance(step, steps.SelectStep):
            return _select(step.inputs[0], step.index)
        return step.run if isinstance(step, TorchStep) else partial(_CALLS[type(step)], step)


def elementwise(step: steps.ElementwiseStep, channel_axis: int = 1) -> Callable[..., Tensor]:
    """A function (values, out=None) -> the result, in ``out`` if given. channel_axis: of 4-D values."""
    first, second, activation = step.inputs[0], step.inputs[-1], step.activation
    if step.scale is not None and step.shift is not None:
        shape = [-1 if axis == channel_axis else 1 for axis in range(4)]
        scale, shift = step.scale.view(shape), step.shift.view(shape)
        multiply = partial(torch.addcmul, shift)
        return lambda values, out=None: activate_(multiply(values[first], scale, out=out), activation)
    if step.kind == "activation":

        def call(values: dict[str, Any], out: Tensor | None = None) -> Tensor:
            x = values[first]
            if out is None:
                return activate(x, activation)
            return activate_(out if out.data_ptr() == x.data_ptr() else out.copy_(x), activation)

        return call
    combine = torch.add if step.kind == "add" else torch.mul
    return lambda values, out=None: activate_(combine(values[first], values[second], out=out), activation)


def _resize(step: steps.ResizeStep, values: dict[str, Any]) -> Tensor:
    x = values[step.inputs[0]]
    if x.dim() == 2:
        x = x[:, :, None, None]
    if step.factor > 1:
        x = F.pixel_shuffle(x, step.factor) if step.shuffle else F.interpolate(x, None, step.factor)
    top, bottom, left, right = step.pads
    return F.pad(x, (left, right, top, bottom), value=step.value) if any(step.pads) else x


_ALIGN_CORNERS = {"nearest": None, "bilinear": False, "corners": True}  # by the kind of an interpolation


def _fit(step: steps.FitStep, values: dict[str, Any]) -> Tensor:
    x, *like = (values[name] for name in step.inputs)
    size: Any = like[0].shape[2:] if like else step.size
    if step.kind in _ALIGN_CORNERS:
        mode, factor = step.kind.replace("corners", "bilinear"), None if size else float(step.factor)
        return F.interpolate(x, size, factor, mode, _ALIGN_CORNERS[step.kind])
    height, width = (new - old for new, old in zip(size, x.shape[2:], strict=True))
    top, left = (height // 2, width // 2) if step.kind == "pad_around" else (0, 0)
    return F.pad(x, (left, width - left, top, height - top))


def _norm(step: steps.NormStep, values: dict[str, Any]) -> Tensor:
    y = F.group_norm(values[step.inputs[0]], step.groups, step.scale, step.shift, step.eps)
    return activate_(y, step.activation)


def _linear(step: steps.LinearStep, values: dict[str, Any]) -> Tensor:
    return activate_(F.linear(values[step.inputs[0]], step.weight, step.bias), step.activation)


# (step, values computed so far) -> the step's result.
_CALLS: dict[type[Step], Callable[..., Tensor]] = {
    steps.ConcatStep: lambda step, v: torch.cat([v[name] for name in step.inputs], 1),
    steps.PoolStep: lambda step, v: getattr(F, f"{step.kind}2d")(v[step.inputs[0]], **step.settings),
    steps.ResizeStep: _resize,
    steps.FitStep: _fit,
    steps.NormStep: _norm,
    steps.GlobalPoolStep: lambda step, v: v[step.inputs[0]].mean((2, 3), keepdim=step.keepdim),
    steps.FlattenStep: lambda step, v: v[step.inputs[0]].flatten(1),
    steps.LinearStep: _linear,
}


def _select(source: str, index: tuple[int, ...]) -> Callable[[dict[str, Any]], Tensor]:
    start = index[0]
    if index == tuple(range(start, start + len(index))):
        return lambda values: values[source][:, start : start + len(index)]
    return lambda values: values[source][:, index]


def _batch_limit(program: Program) -> int | None:
    """How many images go through the network together on a CPU; None for all.

    With values above 4 MiB the allocator returns memory to the system after every step, and page faults
    dominate: ResNet-56 g=4 at batch 128 takes 89 ms whole and 74 ms in two halves (2 Zen 5 cores, torch
    2.15). Below 32 images the convolutions lose more than that. A TorchStep may mix images, so its batch is
    never split.
    """
    if any(isinstance(step, TorchStep) for step in program.steps):
        return None
    largest = max(math.prod(shape[1:]) for shape in program.shapes.values())
    return max(32, _LARGEST_VALUE // (4 * largest))
