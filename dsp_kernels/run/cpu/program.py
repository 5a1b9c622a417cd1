"""The CPU executor: native kernels, and plain PyTorch for the steps between that have none.

In bfloat16 and float16 all weights are rounded to 16 bits. Where the CPU multiplies such numbers fast
(``product_dtype``), a convolution rounds its input too and multiplies them; its sum, bias, residual and
activation, and all other steps, are float32, except that short partial sums of float16 products are float16.
On other CPUs nothing else is rounded and all arithmetic is float32, with Winograd's method: another pass
over each map, to round it, would only cost time and accuracy. ``network_tolerance`` bounds both: a weight
and an input are each rounded by at most half an epsilon of the dtype. Input and output may have any floating
dtype.

The Program is cut into segments of native steps. Each segment is one native network whose inputs come from
outside and whose outputs are read later; one thread takes a few images through all its steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.op.spec import memory_format_of
from dsp_kernels.program import steps
from dsp_kernels.program.steps import (
    Program,
    Requantize,
    Runner,
    Step,
    TorchStep,
    flattened_maps,
    is_activation,
)
from dsp_kernels.run.cpu.call import NativeCall
from dsp_kernels.run.cpu.conv import add_conv, as_array, ending
from dsp_kernels.run.cpu.extension import (
    by_matrices,
    chosen_isa,
    native,
    new_network,
    product_dtype,
    why_missing,
)
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

    def prepare(self, program: Program) -> Runner:
        parts = segments(program)
        dtype = dtype_of(program)
        if _is_whole(parts, program):
            return _whole_network(parts[0], program, dtype)
        # What plain PyTorch reads needs the Program's dtype.
        plain = {name for part in parts if not part.native for name in part.inputs}
        calls = [
            _native_call(part, program, dtype, plain) if part.native else _torch_call(part) for part in parts
        ]

        def run(inputs: Sequence[Tensor]) -> list[Any]:
            pairs = zip(program.inputs, inputs, strict=True)
            values: dict[str, Any] = {name: x.to(dtype) if name in plain else x for name, x in pairs}
            for call, part in zip(calls, parts, strict=True):
                call(values)
                for name in part.dying:
                    del values[name]
            return [values[name] for name in program.outputs]

        return run

    def is_native(self, program: Program) -> bool:
        """Whether no step runs in PyTorch, so that neither autograd nor autocast can affect a call."""
        return _is_whole(segments(program), program)

    def describe(self, program: Program, verbose: bool = False) -> list[str]:
        """Per step, the instruction set that runs it, or the reason why none does.

        verbose: also what runs for the example's batch, for each range of its images: the kernel with the
        sizes of its tiles (filters x vectors), the images that are interleaved in vectors, the threads.
        """
        isa, dtype = chosen_isa(), dtype_of(program)
        launched = _launched(program, dtype) if verbose else {}
        forms = []
        for step, reason in zip(program.steps, _why_not_native(program), strict=True):
            form = f"cpu {isa}{_arithmetic(isa, dtype, step) if isinstance(step, steps.ConvStep) else ''}"
            form = "; ".join([form, *launched.get(step.output, [])])
            forms.append(form if not reason else "" if isinstance(step, TorchStep) else reason)
        return forms


def _launched(program: Program, dtype: torch.dtype) -> dict[str, list[str]]:
    """Value -> the operations that compute it for the example's batch, one for each range of images."""
    found: dict[str, list[str]] = {}
    threads = torch.get_num_threads()
    for network, shapes, names in native_networks(program, dtype):
        sizes = [shape[1:] for shape in shapes]
        for launch in network.launches(sizes, program.shapes[program.inputs[0]][0], threads):
            how = "together on one after the other" if launch["together"] else "on blocks"
            where = f"{launch['images']} images, {launch['interleave']} interleaved, {threads} threads {how}"
            for value, operation in launch["operations"]:
                found.setdefault(names.get(value, ""), []).append(f"{operation} ({where})")
    return found


def native_networks(program: Program, dtype: torch.dtype) -> Iterator[tuple[Any, list[Any], dict[int, str]]]:
    """The native networks of a Program: each with the (channels, height, width) of its inputs and the names
    of its values by number."""
    for part in (part for part in segments(program) if part.native):
        network, values = build(part, program, dtype)
        shapes = [(*program.shapes[name][1:], 1, 1)[:3] for name in part.inputs]
        yield network, shapes, {value: name for name, value in values.items()}


def _arithmetic(isa: str, dtype: torch.dtype, step: steps.ConvStep) -> str:
    if dtype == torch.float32 and not step.requantize:
        return ""
    module, name = native(), "integers" if step.requantize else str(dtype).removeprefix("torch.")
    assert module is not None
    if step.requantize:  # depthwise convolutions stay in float32 everywhere
        if step.requantize.exact or "int8" not in module.own_products(isa):
            return ", integers by float32 arithmetic"
        factors = "matrices (AMX)" if by_matrices(isa, torch.int8) else "products"
        return f", integers, by 8-bit {factors} where they pay"
    if product_dtype(dtype) == torch.float32:
        return f", {name} weights, float32 arithmetic"
    if by_matrices(isa, dtype):
        return f", {name}, by matrices (AMX) where they pay"
    return f", {name}{'' if name in module.own_products(isa) else ' by float32 arithmetic'}"


def dtype_of(program: Program) -> torch.dtype:
    """The 16-bit dtype of the Program's tensors, else float32."""
    found: list[torch.dtype] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor.dtype)
        return tensor

    program.map_tensors(note)
    return next((dtype for dtype in found if dtype in _DTYPES[1:]), torch.float32)


@dataclass(frozen=True)
class Segment:
    """Consecutive steps, all native or none. inputs: values made outside; outputs: values read later.

    dying: those of its inputs, and of the values that its plain PyTorch steps make, that nothing reads later.
    """

    native: bool
    steps: tuple[Step, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dying: tuple[str, ...]


def segments(program: Program) -> tuple[Segment, ...]:
    """The Program as alternating runs of native and plain PyTorch steps, in order."""
    parts, end, last_use, known = [], 0, program.last_use, list(program.inputs)
    reasons = zip(_why_not_native(program), program.steps, strict=True)
    for is_native, run in groupby(reasons, key=lambda pair: not pair[0]):
        own = tuple(step for _, step in run)
        end += len(own)
        made = [step.output for step in own]
        read = {name for step in own for name in step.inputs}
        inputs = tuple(name for name in known if name in read)
        known += made
        outputs = tuple(name for name in made if last_use[name] >= end)
        held = inputs if is_native else (*inputs, *made)
        dying = tuple(name for name in held if last_use[name] < end)
        parts.append(Segment(is_native, own, inputs, outputs, dying))
    return tuple(parts)


def _is_whole(parts: tuple[Segment, ...], program: Program) -> bool:
    """Whether the Program is a single native network."""
    if len(parts) != 1 or not parts[0].native:
        return False
    return (parts[0].inputs, parts[0].outputs) == (program.inputs, program.outputs)


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
        if isinstance(step, steps.LinearStep):
            return "" if ranks[0] == 2 else "eager: a linear layer over the last axis of an image"
        features = {name for name, rank in zip(step.inputs, ranks, strict=False) if rank == 2}
        # The native network keeps a flattened map as its planes: elementwise steps work on it, but its
        # features cannot be indexed.
        if features & (flattened.derived if is_activation(step) else flattened.maps | flattened.derived):
            return "eager: its features are the numbers of a map of any size"
        return ""

    return [reason(step) for step in program.steps]


def _torch_call(part: Segment) -> Callable[[dict[str, Any]], None]:
    step_calls = [(step.output, EagerExecutor().call(step)) for step in part.steps]

    def call(values: dict[str, Any]) -> None:
        for name, step_call in step_calls:
            values[name] = step_call(values)

    return call


def _whole_network(part: Segment, program: Program, dtype: torch.dtype) -> Runner:
    """_native_call without the dict of values: at batch 1 every microsecond around the kernels shows."""
    network = _caller(part, program, dtype)

    def run(inputs: Sequence[Tensor]) -> list[Any]:
        tensors = []
        for x in inputs:
            if x.requires_grad:
                x = x.detach()
            tensors.append(x if x.dtype == torch.float32 else x.float())
        return network(tensors, memory_format_of(inputs[0]))

    return run


def _native_call(
    part: Segment, program: Program, dtype: torch.dtype, plain: set[str]
) -> Callable[[dict[str, Any]], None]:
    network = _caller(part, program, dtype)
    dtypes = [dtype if name in plain else torch.float32 for name in part.outputs]

    def call(values: dict[str, Any]) -> None:
        tensors = [values[name].detach().float() for name in part.inputs]
        results = network(tensors, memory_format_of(tensors[0]))
        for name, result, kind in zip(part.outputs, results, dtypes, strict=True):
            values[name] = result.to(kind)

    return call


def _caller(part: Segment, program: Program, dtype: torch.dtype) -> NativeCall:
    network, _ = build(part, program, dtype)
    return NativeCall(network, [len(program.shapes[name]) == 2 for name in part.outputs])


def build(part: Segment, program: Program, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, int]]:
    """A native Network of these steps of a Program, and the numbers of its values by name.

    dtype: see the module's docstring.
    """
    network = new_network(dtype)
    value: dict[str, int] = {name: network.input(program.shapes[name][1]) for name in part.inputs}
    for step in part.steps:
        value[step.output] = _NATIVE[type(step)](network, step, *(value[name] for name in step.inputs))
    for name in part.outputs:
        network.output(value[name])
    return network, value


def _conv(network: Any, step: steps.ConvStep, x: int, residual: int = -1) -> int:
    return add_conv(network, step.spec, step.weights, step.bias, x, residual, step.requantize)


def _elementwise(network: Any, step: steps.ElementwiseStep, x: int, y: int = -1) -> Any:
    if step.kind == "multiply":
        return network.product(x, y, step.activation, ending(step.requantize))
    scale, shift = (None if part is None else as_array(part) for part in (step.scale, step.shift))
    return network.map(x, y, scale, shift, step.activation, ending(step.requantize))


def _quantize(network: Any, step: steps.QuantizeStep, x: int) -> Any:
    made = Requantize(torch.tensor([step.inverse]), None, step.low, step.high)
    return network.map(x, -1, None, None, "none", ending(made))


def _dequantize(network: Any, step: steps.DequantizeStep, x: int) -> Any:
    return network.map(x, -1, None, None, "none", ending(Requantize(torch.tensor([step.scale]))))


def _pool(network: Any, step: steps.PoolStep, x: int) -> Any:
    if step.kind == "adaptive_avg_pool":
        return network.adaptive(x, step.settings["output_size"], ending(step.requantize))
    return network.pool(x, kind=step.kind, **step.settings, requantize=ending(step.requantize))


def _linear(network: Any, step: steps.LinearStep, x: int) -> Any:
    bias = None if step.bias is None else as_array(step.bias)
    return network.linear(x, as_array(step.weight), bias, step.activation, ending(step.requantize))


def _norm(network: Any, step: steps.NormStep, x: int) -> Any:
    scale, shift = as_array(step.scale), as_array(step.shift)
    return network.norm(x, step.groups, step.eps, scale, shift, step.activation)


# (network, step, numbers of its input values) -> number of its output value.
_NATIVE: dict[type[Step], Callable[..., Any]] = {
    steps.ConvStep: _conv,
    steps.ElementwiseStep: _elementwise,
    steps.QuantizeStep: _quantize,
    steps.DequantizeStep: _dequantize,
    steps.ConcatStep: lambda n, step, *xs: n.concat(list(xs)),
    steps.SelectStep: lambda n, step, x: n.select(x, step.index),
    steps.PoolStep: _pool,
    steps.ResizeStep: lambda n, step, x: n.resize(x, step.factor, step.shuffle, step.pads, step.value),
    steps.FitStep: lambda n, step, x, like=-1: n.fit(x, like, step.kind, step.size or (0, 0), step.factor),
    steps.NormStep: _norm,
    steps.GlobalPoolStep: lambda n, step, x: n.adaptive(x, (1, 1), ending(step.requantize)),
    steps.FlattenStep: lambda n, step, x: n.concat([x]),
    steps.LinearStep: _linear,
}
