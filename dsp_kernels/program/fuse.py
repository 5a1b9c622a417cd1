"""fuse(model, example_input): a packed model as one network that runs a Program."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from dsp_kernels.errors import DSPBackendError, DSPShapeError, DSPTraceError
from dsp_kernels.graph.compare import compare_answers, tensors_of
from dsp_kernels.graph.inputs import Example, fusable_inputs, images_like
from dsp_kernels.graph.network import evaluating, trace
from dsp_kernels.graph.operations.table import LEAF_TYPES
from dsp_kernels.op.spec import memory_format_of
from dsp_kernels.program.planner import plan
from dsp_kernels.program.steps import ConvStep, LinearStep, Program, Runner, TorchStep, ValueRef, map_nested
from dsp_kernels.run.cpu.extension import adds_in_half, warn_if_missing
from dsp_kernels.run.gpu.layout import uses_tf32
from dsp_kernels.run.programs import EXECUTORS
from dsp_kernels.tolerances import network_tolerance


def fuse(
    model: nn.Module,
    example_input: Example | None = None,
    backend: str = "auto",
    dtype: torch.dtype | None = None,
) -> FusedNetwork:
    """A packed (or any) CNN as one fused module for inference, with the same answers.

    example_input: (batch, channels, height, width), or (batch, features), on the model's device; a tuple of
    them for a model of several inputs. Any batch size stands for all. A quantised network needs none.
    backend: "auto" for the first that works, or the name of an executor: "cuda", "triton", "cudnn", "cpu",
    "eager". dtype: of weights and activations inside, None for the model's; inputs and outputs keep their own
    dtype. On a GPU float32 may be multiplied in TF32 where PyTorch's convolutions are, by default
    (``torch.backends.cudnn.allow_tf32``), and what runs each step is measured once (DSP_KERNELS_TUNE=0: not).

    The model may answer with a tensor or with nested tuples, lists and dicts of tensors; numbers, strings and
    None among them are kept. The model is not changed and shares no memory with the result, except that a
    quantised network shares its Program. Before it is returned, it is compared with the model in eval mode,
    on the example and on random images.
    Raises DSPShapeError for any other example, DSPTraceError if the model cannot be traced or run on it or
    answers with anything else, DSPBackendError if the backend cannot run the network, and
    DSPVerificationError if the answers differ by more than rounding.

    >>> import torch, dsp_kernels
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
    >>> fused = dsp_kernels.fuse(net, torch.zeros(1, 3, 16, 16))
    >>> x = torch.randn(5, 3, 16, 16)
    >>> torch.allclose(fused(x), net(x), atol=1e-4)
    True
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise DSPBackendError(f"dtype is {dtype!r}; expected a torch.dtype, as torch.bfloat16")
    if example_input is None:
        example_input = example_of(model)
    inputs = fusable_inputs(model, example_input)
    if isinstance(model, LEAF_TYPES):
        model = nn.Sequential(model)  # torch.fx traces what a module calls, not the module itself
    dtype, device = dtype or inputs[0].dtype, inputs[0].device
    if backend == "auto" and device.type == "cpu":
        warn_if_missing()
    if isinstance(model, FusedNetwork) and model.program.is_integer:
        if dtype != torch.float32:
            raise DSPBackendError(f"dtype is {dtype}; a quantised network computes in integers: leave it out")
        program = model.program
    else:
        program = float_program(model, inputs, dtype)
    fused = FusedNetwork(program, dtype, device, backend)
    fused._take_first(lambda: _verify(fused, model, inputs))
    return fused


def example_of(model: nn.Module) -> tuple[Tensor, ...]:
    """Zeros of the shapes that a quantised network holds. Raises DSPShapeError for another model."""
    if not isinstance(model, FusedNetwork) or not model.program.is_integer:
        raise DSPShapeError("fuse() needs an example input for any but a quantised network")
    shapes = (model.program.shapes[name] for name in model.program.inputs)
    return tuple(torch.zeros(shape, device=model.device) for shape in shapes)


def float_program(model: nn.Module, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> Program:
    """The Program of a model in eval mode, with a copy of every tensor; norms are folded in float64."""
    # Modules that stay plain PyTorch are copied in eval mode.
    with evaluating(model):
        return plan(trace(model, inputs)).map_tensors(
            lambda t: t.detach().to(dtype, copy=True) if t.is_floating_point() else t.detach().clone()
        )


class FusedNetwork(nn.Module):
    """A network that runs a Program; made by ``fuse``. For inference only: always in eval mode.

    Call it as the model, with any batch size; its dicts are plain ones. ``.to()`` moves it, ``copy.deepcopy``
    copies it, ``explain()`` lists its steps. It has no parameters: save the packed model instead.

    >>> import torch, dsp_kernels
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
    >>> fused = dsp_kernels.fuse(net, torch.zeros(1, 3, 16, 16), backend="eager")
    >>> fused.backend, len(fused.program.steps)
    ('eager', 1)
    >>> print(fused.explain())  # doctest: +ELLIPSIS
    fused network: 1 steps, 0 of them plain PyTorch; backend eager, torch.float32, 0.04 M multiply-adds ...
    """

    def __init__(
        self, program: Program, dtype: torch.dtype, device: torch.device, backend: str = "auto"
    ) -> None:
        super().__init__()
        self.program = program
        self.dtype = dtype
        self.device = device
        self.backend = EXECUTORS.choose(backend, program, dtype, device).name
        self._requested_backend = backend
        self._example_shapes = tuple(program.shapes[name] for name in program.inputs)
        self._runners: dict[str, Runner] = {}
        super().train(False)

    def forward(self, *inputs: Tensor) -> Any:
        """inputs: as of the example, floating, on the network's device -> the model's answer.

        Feature maps come out in the first input's memory format, floating tensors in its dtype.
        Raises DSPShapeError for any other input.
        """
        program, examples, plain = self.program, self._example_shapes, True
        if len(inputs) != len(examples):
            raise DSPShapeError(f"{len(inputs)} inputs; this network takes {len(examples)}")
        first = inputs[0]
        for place, x in enumerate(inputs):  # at batch 1 every microsecond shows: zip(strict=True) takes 0.3
            example = examples[place]
            if not isinstance(x, Tensor):
                raise DSPShapeError(f"the input is a {type(x).__name__}; expected a tensor")
            shape = x.shape
            other = x is not first and shape[:1] != first.shape[:1]
            if len(shape) != len(example) or shape[1] != example[1] or other:
                sizes = ", height, width" * (len(example) == 4)
                raise DSPShapeError(
                    f"input has shape {tuple(shape)}; expected (batch, {example[1]}{sizes})"
                    f"{', and one batch in all inputs' * (len(inputs) > 1)}"
                )
            if not x.dtype.is_floating_point or x.device != self.device:
                raise DSPShapeError(
                    f"input is {x.dtype} on {x.device}; expected a floating dtype on {self.device}"
                )
            plain = plain and type(x) is Tensor
        if program.check is not None:
            program.check(first)
        results = self._runner_for(plain)(inputs)
        if type(program.answer) is ValueRef:
            return _like(first, results[0])
        made = {name: _like(first, result) for name, result in zip(program.outputs, results, strict=True)}
        return map_nested(lambda part: made[part.name] if type(part) is ValueRef else part, program.answer)

    def _runner_for(self, plain_tensors: bool) -> Runner:
        # A recorder (torch.compile, torch.export, a dispatch mode) has to see PyTorch's own operations.
        recorded = (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._len_torch_dispatch_stack() > 0
            or not plain_tensors
        )
        runners = self._runners  # read first: ``_apply`` in another thread replaces it last
        name = "eager" if recorded else self.backend
        runner = runners.get(name)
        if runner is None:
            executor = EXECUTORS.choose(name, self.program, self.dtype, self.device)
            # It is kept, so a recorder must not make its weights fake or record their packing.
            with nullcontext() if torch.compiler.is_dynamo_compiling() else _disable_current_modes():
                runner = executor.prepare(self.program)
            if not executor.takes_any_dtype:
                runner = _with_input_dtype(runner, self.dtype)
            if not executor.is_native(self.program):
                runner = _without_autograd(runner, self.device.type)
            runners[name] = runner
        return runner

    def explain(self, verbose: bool = False) -> str:
        """One line per step: what is fused into it, how it runs, and why it stays plain PyTorch.

        verbose: also what is launched for a batch of the example's size: kernels, tiles, threads; on the CPU
        the time of each step, measured now and predicted from what ``dsp calibrate`` measured.
        """
        executor = EXECUTORS.choose(self.backend, self.program, self.dtype, self.device)
        forms = executor.describe(self.program, verbose)
        clocked: dict[str, str] = {}
        if verbose and self.backend == "cpu":
            from dsp_kernels.times.clocked import explained_steps  # not for every import of dsp_kernels

            clocked = explained_steps(self.program)
        plain = sum(isinstance(step, TorchStep) for step in self.program.steps)
        notes = self.program.notes
        numbers = "8-bit integers" if self.program.is_integer else self.dtype
        lines = [
            f"fused network: {len(self.program.steps)} steps, {plain} of them plain PyTorch; backend "
            f"{self.backend}, {numbers}, {self.program.macs / 1e6:.2f} M multiply-adds per image of "
            f"{' and '.join('x'.join(map(str, shape[1:])) for shape in self._example_shapes)}"
        ]
        for step, form in zip(self.program.steps, forms, strict=True):
            size = "x".join(map(str, self.program.shapes.get(step.output, ())[1:]))
            why = f", float: {notes[step.output]}" if step.output in notes else ""
            how = "; ".join(filter(None, (form, clocked.get(step.output))))
            shown = f"{step.describe()}{why}{f'  [{how}]' if how else ''}"
            lines.append(f"  {step.output:<28} {size:<12} {shown}")
        return "\n".join(lines)

    def train(self, mode: bool = True) -> FusedNetwork:
        """No-op: the network stays in eval mode, because its norms are folded."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FusedNetwork:
        # .to(), .cuda(), .half() come here.
        program = self.program.map_tensors(fn)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        backend = EXECUTORS.choose(self._requested_backend, program, probe.dtype, probe.device).name
        before = dict(vars(self))
        self.program, self.backend, self.dtype, self.device = program, backend, probe.dtype, probe.device
        self._runners = {}
        if self._requested_backend == "auto":  # a launch may fail that can_run allows
            zeros = [probe.new_zeros((1, *shape[1:])) for shape in self._example_shapes]
            try:
                self._take_first(lambda: self(*zeros))
            except Exception:
                vars(self).update(before)
                raise
        return self

    def _take_first(self, check: Callable[[], object]) -> None:
        """Takes the first of the backends that can run this with which the check passes; warns of others."""
        request = self._requested_backend, self.program, self.dtype, self.device
        names = [executor.name for executor in EXECUTORS.candidates(*request)]
        for self.backend in names:
            try:
                check()
                return
            except Exception as error:
                if self.backend == names[-1] or isinstance(error, DSPTraceError):
                    raise
                reason = f"because {self.backend} failed: {error}"
                warnings.warn(f"fuse tries another backend, {reason}", stacklevel=3)

    def __getstate__(self) -> dict[str, Any]:
        # Runners are closures, which cannot be pickled.
        return {**self.__dict__, "_runners": {}}


def _like(x: Tensor, result: Any) -> Any:
    """A result in the memory format of ``x`` and, if it is floating, in its dtype."""
    if not isinstance(result, Tensor):
        if isinstance(result, list | tuple | dict):
            return map_nested(lambda part: _like(x, part), result)
        return result
    if result.dtype != x.dtype and result.dtype.is_floating_point:  # .to() costs 3 us even as a no-op
        result = result.to(x.dtype)
    if result.dim() != 4:
        return result.contiguous()
    return result.contiguous(memory_format=memory_format_of(x))


def _without_autograd(runner: Runner, device_type: str) -> Runner:
    """Outside the caller's autograd and autocast."""

    def run(inputs: Sequence[Tensor]) -> list[Any]:
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            return runner(inputs)

    return run


def _with_input_dtype(runner: Runner, dtype: torch.dtype) -> Runner:
    return lambda inputs: runner([x.to(dtype) for x in inputs])


def _verify(fused: FusedNetwork, model: nn.Module, example: tuple[Tensor, ...]) -> None:
    convs = [step for step in fused.program.steps if isinstance(step, ConvStep)]
    depth = len(convs) + sum(isinstance(step, LinearStep) for step in fused.program.steps)
    reduction = max((weight[0].numel() for step in convs for weight in step.weights), default=1)
    # However exact the fused network is, the model rounds to its own dtype.
    coarsest = max(fused.dtype, *(x.dtype for x in example), key=lambda dtype: torch.finfo(dtype).eps)
    if fused.device.type == "cuda" and uses_tf32(coarsest):
        coarsest = torch.float16  # TF32 has as many bits
    half_sums = fused.dtype == torch.float16 and fused.backend == "cpu" and adds_in_half()
    bound = network_tolerance(coarsest, reduction, depth, half_sums)
    if fused.program.is_integer:
        # Integers are equal to the bit. Where float steps round differently, some values differ by a level,
        # 1/255 of a range; bfloat16 rounds to 1/256.
        bound = network_tolerance(torch.bfloat16, 1, depth) if fused.program.notes else 0.0
    with evaluating(model), torch.no_grad(), torch.autocast(fused.device.type, enabled=False):
        for images, inputs in images_like(example).items():
            expected = model(*(x.clone() for x in inputs))  # a model may write into its input
            map_nested(_check_answered, expected)
            got = fused(*(x.clone() for x in inputs))
            expected, got = _without_integers(tensors_of(expected), tensors_of(got))
            what = "the fused network differs from the model"
            advice = ". If the model is right, please report this"
            compare_answers(expected, got, bound, what, images, model=model, dtype=coarsest, advice=advice)


def _check_answered(part: Any) -> Any:
    if not isinstance(part, Tensor | int | float | str | None):
        raise DSPTraceError(
            "fuse() takes a network that answers with tensors, or tuples, lists and dicts of them; this one "
            f"returns a {type(part).__name__}; use swap()"
        )
    return part


def _without_integers(expected: list[Tensor], got: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Two answers with zeros for integers: rounding decides which of two close numbers is the larger.

    Of answers of integers only, each becomes one number, and they differ where most of the integers do.
    """
    shapes = [[x.shape for x in answer] for answer in (expected, got)]
    if shapes[0] == shapes[1] and not any(x.is_floating_point() for x in expected):
        wrong = sum(int((a != b).sum()) for a, b in zip(expected, got, strict=True))
        return [torch.zeros(1)], [torch.tensor([float(2 * wrong > sum(x.numel() for x in expected))])]
    a, b = ([x if x.is_floating_point() else x * 0 for x in answer] for answer in (expected, got))
    return a, b
