"""Runs a Program by the native CPU kernels; what they do not know runs in plain PyTorch between.

In bfloat16 a convolution rounds what it reads and multiplies bfloat16 numbers; its sum, bias, residual and
activation and all other steps are float32. In float16 it is so on CPUs with AVX512-FP16, but for short sums
of products, which are float16 too; on others only the Program's numbers are float16 and all arithmetic is
float32. Input and output may have any dtype.

The Program is cut into runs of native steps. Each run is one native network with the values it needs as
inputs and the values that are needed later as outputs; one thread takes a few images through all its steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.errors import DSPShapeError
from dsp_kernels.program.steps import (
    ActivationStep,
    ConvStep,
    GateStep,
    LinearStep,
    Program,
    Step,
    TorchStep,
    flattened_maps,
)
from dsp_kernels.run.cpu.builder import NATIVE_STEPS, build
from dsp_kernels.run.cpu.extension import chosen_isa, native, why_missing

__all__ = ["CpuExecutor", "Segment", "segments"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Segment:
    """Neighbouring steps that run in one way. inputs: values from outside; outputs: values needed later."""

    native: bool
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class CpuExecutor:
    """Native for all steps that are not plain PyTorch; see the module's text."""

    name = "cpu"
    takes_any_dtype = True

    def can_run(self, program: Program, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """On the CPU in float32 or 16 bit, with the extension built and a native step in the Program."""
        if device.type != "cpu":
            return False, f"the network is on {device}; move it and its example to the CPU"
        if dtype not in _DTYPES:
            return False, f"dtype {dtype} is none of float32, bfloat16 and float16"
        if native() is None:
            return False, why_missing()
        if not any(_is_native(step, program) for step in program.steps):
            return False, "no step of this network is a native one"
        return True, ""

    def prepare(self, program: Program) -> Callable[[Tensor], Tensor]:
        """A function x -> y; see ``Executor.prepare``."""
        parts = segments(program)
        dtype = _dtype(program)
        if self.is_native(program):
            return _whole_network(parts[0], program, dtype)
        calls = [_native_call(part, program, dtype) if part.native else _torch_call(part) for part in parts]
        plain_input = any(program.input in part.inputs for part in parts if not part.native)
        needed_after = [
            {name for later in parts[n + 1 :] for name in later.inputs} for n in range(len(parts))
        ]

        def run(x: Tensor) -> Tensor:
            values: dict[str, Any] = {program.input: x.to(dtype) if plain_input else x}
            for call, needed in zip(calls, needed_after, strict=True):
                call(values)
                for name in values.keys() - needed - {program.output}:
                    del values[name]
            result: Tensor = values[program.output]
            return result.contiguous()

        return run

    def is_native(self, program: Program) -> bool:
        """Whether no step is PyTorch's, so that neither autograd nor autocast can meddle with a call."""
        parts = segments(program)
        if len(parts) != 1 or not parts[0].native:
            return False
        return (parts[0].inputs, parts[0].outputs) == ((program.input,), (program.output,))

    def describe(self, program: Program) -> list[str]:
        """Per step, the instruction set that runs it, or why none does."""
        isa = chosen_isa()
        dtype = _dtype(program)
        forms = []
        for step in program.steps:
            reason = _why_not(step, program)
            form = f"cpu {isa}{_products(isa, dtype) if isinstance(step, ConvStep) else ''}"
            forms.append(form if not reason else "" if isinstance(step, TorchStep) else reason)
        return forms


def _products(isa: str, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return ""
    module, name = native(), str(dtype).removeprefix("torch.")
    assert module is not None
    return f", {name}{'' if name in module.own_products(isa) else ' by float32 arithmetic'}"


def _dtype(program: Program) -> torch.dtype:
    """Of the Program's numbers."""
    held: list[torch.dtype] = []

    def note(tensor: Tensor) -> Tensor:
        held.append(tensor.dtype)
        return tensor

    program.map_tensors(note)
    return next((dtype for dtype in held if dtype in _DTYPES[1:]), torch.float32)


def segments(program: Program) -> tuple[Segment, ...]:
    """The Program as runs of native steps and the plain steps between them, in order."""
    runs: list[tuple[bool, list[Step]]] = []
    for step in program.steps:
        kind = _is_native(step, program)
        if not runs or runs[-1][0] != kind:
            runs.append((kind, []))
        runs[-1][1].append(step)
    parts = []
    for number, (kind, steps) in enumerate(runs):
        made = {step.output for step in steps}
        later = {name for _, rest in runs[number + 1 :] for step in rest for name in step.inputs}
        inputs = dict.fromkeys(name for step in steps for name in step.inputs if name not in made)
        outputs = tuple(step.output for step in steps if step.output in later | {program.output})
        parts.append(Segment(kind, tuple(steps), tuple(inputs), outputs))
    return tuple(parts)


def _is_native(step: Step, program: Program) -> bool:
    return not _why_not(step, program)


def _why_not(step: Step, program: Program) -> str:
    """Why a step runs in plain PyTorch; empty if it is native."""
    if not isinstance(step, NATIVE_STEPS):
        return "plain PyTorch"
    # A value as (batch, features) or (batch, channels, height, width); others have no planes.
    shapes = [program.shapes.get(name) for name in (*step.inputs, step.output)]
    if any(shape is None or len(shape) not in (2, 4) for shape in shapes):
        return "eager: its tensors are neither images nor feature vectors"
    if isinstance(step, LinearStep) and len(program.shapes[step.inputs[0]]) != 2:
        return "eager: a linear layer over the last axis of an image"
    features = {name for name in step.inputs if len(program.shapes[name]) == 2}
    if features and not isinstance(step, LinearStep):
        # A flattened map is its planes still: single numbers can be changed, but not counted as features.
        flattened = flattened_maps(program.steps, program.shapes)
        alone = isinstance(step, (ActivationStep, GateStep))
        if features & (flattened.derived if alone else flattened.maps | flattened.derived):
            return "eager: its features are the numbers of a map of any size"
    return ""


def _torch_call(part: Segment) -> Callable[[dict[str, Any]], None]:
    # A native kind of step with tensors of an odd shape runs as the eager executor runs it.
    from dsp_kernels.run.eager.program import EagerExecutor

    step_calls = [(step.output, EagerExecutor().call(step)) for step in part.steps]

    def call(values: dict[str, Any]) -> None:
        for name, step_call in step_calls:
            values[name] = step_call(values)

    return call


def _whole_network(part: Segment, program: Program, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """As _native_call, for a Program that is nothing else: at batch 1 every microsecond around it shows."""
    network = _build(part, program, dtype)
    is_vector = [len(program.shapes[program.output]) == 2]

    def run(x: Tensor) -> Tensor:
        if x.requires_grad:
            x = x.detach()
        if x.dtype != torch.float32:
            x = x.float()
        return _compute(network, [x], is_vector)[0]

    return run


def _native_call(part: Segment, program: Program, dtype: torch.dtype) -> Callable[[dict[str, Any]], None]:
    network = _build(part, program, dtype)
    is_vector = [len(program.shapes[name]) == 2 for name in part.outputs]
    # What plain PyTorch reads has its dtype; the network's own answer stays as exact as it is.
    dtypes = [torch.float32 if name == program.output else dtype for name in part.outputs]

    def call(values: dict[str, Any]) -> None:
        tensors = [values[name].detach().float() for name in part.inputs]
        results = _compute(network, tensors, is_vector)
        for name, result, kind in zip(part.outputs, results, dtypes, strict=True):
            values[name] = result.to(kind)

    return call


def _build(part: Segment, program: Program, dtype: torch.dtype) -> Any:
    channels = [program.shapes[name][1] for name in part.inputs]
    return build(part.inputs, channels, part.steps, part.outputs, dtype)


def _compute(network: Any, tensors: list[Tensor], is_vector: list[bool]) -> list[Tensor]:
    """The outputs of a native network for float32 inputs: (batch, features) where is_vector, else maps."""
    images = tensors[0].shape[0]
    try:
        shapes = network.output_shapes([_pixels(tensor) for tensor in tensors])
        results = []
        for shape, vector in zip(shapes, is_vector, strict=True):
            size = (images, shape[0]) if vector and shape[1] == shape[2] == 1 else (images, *shape)
            results.append(torch.empty(size, dtype=torch.float32, device="cpu"))
        if images:
            network.run(
                [tensor.numpy() for tensor in tensors],
                [result.numpy() for result in results],
                torch.get_num_threads(),
            )
    except ValueError as error:
        raise DSPShapeError(f"this network cannot take this input: {error}") from error
    return [
        result.flatten(1) if vector and result.dim() > 2 else result
        for result, vector in zip(results, is_vector, strict=True)
    ]


def _pixels(tensor: Tensor) -> tuple[int, int]:
    return (tensor.shape[2], tensor.shape[3]) if tensor.dim() == 4 else (1, 1)
