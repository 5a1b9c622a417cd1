"""The CPU executor: native kernels, and plain PyTorch for the steps between that have none.

In bfloat16 a convolution rounds its input and multiplies bfloat16 numbers; its sum, bias, residual and
activation, and all other steps, are float32. float16 does the same on CPUs with AVX512-FP16, except that
short partial sums of products are float16 too; on other CPUs only the weights are float16 and all
arithmetic is float32. Input and output may have any floating dtype.

The Program is cut into segments of native steps. Each segment is one native network whose inputs come from
outside and whose outputs are read later; one thread takes a few images through all its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.errors import DSPShapeError
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
    flattened_maps,
)
from dsp_kernels.run.cpu.conv import add_conv, as_array
from dsp_kernels.run.cpu.extension import chosen_isa, native, new_network, why_missing
from dsp_kernels.run.eager.program import EagerExecutor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class CpuExecutor:
    """Native kernels for all steps that have one; see the module's docstring."""

    name = "cpu"
    takes_any_dtype = True

    def can_run(self, program: Program, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """On the CPU in float32 or 16 bits, with the extension built and a native step in the Program."""
        if device.type != "cpu":
            return False, f"the network is on {device}; move it and its example to the CPU"
        if dtype not in _DTYPES:
            return False, f"dtype {dtype} is none of float32, bfloat16 and float16"
        if native() is None:
            return False, why_missing()
        if all(_why_not_native(program)):
            return False, "no step of this network is a native one"
        return True, ""

    def prepare(self, program: Program) -> Callable[[Tensor], Tensor]:
        """A function x -> y; see ``Executor.prepare``."""
        parts = segments(program)
        dtype = _dtype(program)
        if _is_whole(parts, program):
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
        """Whether no step runs in PyTorch, so that neither autograd nor autocast can affect a call."""
        return _is_whole(segments(program), program)

    def describe(self, program: Program) -> list[str]:
        """Per step, the instruction set that runs it, or the reason why none does."""
        isa, dtype = chosen_isa(), _dtype(program)
        forms = []
        for step, reason in zip(program.steps, _why_not_native(program), strict=True):
            form = f"cpu {isa}{_arithmetic(isa, dtype) if isinstance(step, ConvStep) else ''}"
            forms.append(form if not reason else "" if isinstance(step, TorchStep) else reason)
        return forms


def _arithmetic(isa: str, dtype: torch.dtype) -> str:
    if dtype == torch.float32:
        return ""
    module, name = native(), str(dtype).removeprefix("torch.")
    assert module is not None
    return f", {name}{'' if name in module.own_products(isa) else ' by float32 arithmetic'}"


def _dtype(program: Program) -> torch.dtype:
    """The 16-bit dtype of the Program's tensors, else float32."""
    found: list[torch.dtype] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor.dtype)
        return tensor

    program.map_tensors(note)
    return next((dtype for dtype in found if dtype in _DTYPES[1:]), torch.float32)


@dataclass(frozen=True)
class Segment:
    """Consecutive steps, all native or none. inputs: values made outside; outputs: values read later."""

    native: bool
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def segments(program: Program) -> tuple[Segment, ...]:
    """The Program as alternating runs of native and plain PyTorch steps, in order."""
    runs: list[tuple[bool, list[Step]]] = []
    for step, reason in zip(program.steps, _why_not_native(program), strict=True):
        if not runs or runs[-1][0] != (not reason):
            runs.append((not reason, []))
        runs[-1][1].append(step)
    parts = []
    for number, (is_native, steps) in enumerate(runs):
        made = {step.output for step in steps}
        later = {name for _, rest in runs[number + 1 :] for step in rest for name in step.inputs}
        inputs = dict.fromkeys(name for step in steps for name in step.inputs if name not in made)
        outputs = tuple(step.output for step in steps if step.output in later | {program.output})
        parts.append(Segment(is_native, tuple(steps), tuple(inputs), outputs))
    return tuple(parts)


def _is_whole(parts: tuple[Segment, ...], program: Program) -> bool:
    """Whether the Program is a single native network."""
    if len(parts) != 1 or not parts[0].native:
        return False
    return (parts[0].inputs, parts[0].outputs) == ((program.input,), (program.output,))


def _why_not_native(program: Program) -> list[str]:
    """Per step, why it runs in plain PyTorch; empty if it is native."""
    flattened = flattened_maps(program.steps, program.shapes)

    def reason(step: Step) -> str:
        if type(step) not in _NATIVE:
            return "plain PyTorch"
        # The native network holds (batch, features) and (batch, channels, height, width) only.
        ranks = [len(program.shapes.get(name, ())) for name in (*step.inputs, step.output)]
        if any(rank not in (2, 4) for rank in ranks):
            return "eager: its tensors are neither images nor feature vectors"
        if isinstance(step, LinearStep):
            return "" if ranks[0] == 2 else "eager: a linear layer over the last axis of an image"
        features = {name for name, rank in zip(step.inputs, ranks, strict=False) if rank == 2}
        # The native network keeps a flattened map as its planes: elementwise steps work on it, but its
        # features cannot be indexed.
        is_unary = isinstance(step, ActivationStep | GateStep)
        if features & (flattened.derived if is_unary else flattened.maps | flattened.derived):
            return "eager: its features are the numbers of a map of any size"
        return ""

    return [reason(step) for step in program.steps]


def _torch_call(part: Segment) -> Callable[[dict[str, Any]], None]:
    step_calls = [(step.output, EagerExecutor().call(step)) for step in part.steps]

    def call(values: dict[str, Any]) -> None:
        for name, step_call in step_calls:
            values[name] = step_call(values)

    return call


def _whole_network(part: Segment, program: Program, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """_native_call without the dict of values: at batch 1 every microsecond around the kernels shows."""
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
    # Plain PyTorch steps need the Program's dtype; the network's output stays float32.
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
    """float32 inputs -> outputs, (batch, features) where is_vector, else (batch, channels, height, width)."""
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


def build(
    inputs: Sequence[str],
    channels: Sequence[int],
    steps: Sequence[Step],
    outputs: Sequence[str],
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A native Network of these steps. inputs, outputs: values that come from and go to PyTorch.

    dtype: what convolutions multiply (float16 where the CPU can); all other arithmetic is float32.
    """
    network = new_network(bf16=dtype == torch.bfloat16, fp16=dtype == torch.float16)
    value = {name: network.input(width) for name, width in zip(inputs, channels, strict=True)}
    for step in steps:
        value[step.output] = _NATIVE[type(step)](network, step, *(value[name] for name in step.inputs))
    for name in outputs:
        network.output(value[name])
    return network


def _conv(network: Any, step: ConvStep, x: int, residual: int = -1) -> int:
    return add_conv(network, step.spec, step.weights, step.bias, x, residual)


def _pool(network: Any, step: PoolStep, x: int) -> Any:
    settings = step.settings
    return network.pool(
        x,
        step.kind == "avg_pool",
        settings["kernel_size"],
        settings["stride"],
        settings["padding"],
        settings.get("dilation", (1, 1)),
        settings["ceil_mode"],
        settings.get("count_include_pad", True),
        settings.get("divisor_override") or 0,
    )


def _linear(network: Any, step: LinearStep, x: int) -> Any:
    bias = None if step.bias is None else as_array(step.bias)
    return network.linear(x, as_array(step.weight), bias, step.activation)


# (network, step, numbers of its input values) -> number of its output value.
_NATIVE: dict[type[Step], Callable[..., Any]] = {
    ConvStep: _conv,
    AffineStep: lambda n, step, x: n.map(x, -1, as_array(step.scale), as_array(step.shift), step.activation),
    AddStep: lambda n, step, x, y: n.map(x, y, None, None, step.activation),
    MulStep: lambda n, step, x, y: n.product(x, y, step.activation),
    ActivationStep: lambda n, step, x: n.map(x, -1, None, None, step.activation),
    GateStep: lambda n, step, x: n.map(x, -1, None, None, step.kind),
    ConcatStep: lambda n, step, *xs: n.concat(list(xs)),
    SelectStep: lambda n, step, x: n.select(x, step.index),
    PoolStep: _pool,
    GlobalPoolStep: lambda n, step, x: n.mean(x),
    AdaptivePoolStep: lambda n, step, x: n.adaptive(x, step.size),
    FlattenStep: lambda n, step, x: n.flatten(x),
    LinearStep: _linear,
}
