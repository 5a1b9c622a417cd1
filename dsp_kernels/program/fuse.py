"""fuse(model, example_input): a packed model as one network that runs a Program."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from dsp_kernels.errors import DSPBackendError, DSPShapeError
from dsp_kernels.graph.compare import compare_answers
from dsp_kernels.graph.inputs import Example, one_image
from dsp_kernels.graph.network import evaluating, trace
from dsp_kernels.graph.operations.table import LEAF_TYPES
from dsp_kernels.op.spec import memory_format_of
from dsp_kernels.program.planner import plan
from dsp_kernels.program.steps import ConvStep, LinearStep, Program, TorchStep
from dsp_kernels.run.cpu.extension import adds_in_half, warn_if_missing
from dsp_kernels.run.gpu.layout import uses_tf32
from dsp_kernels.run.programs import EXECUTORS, Runner
from dsp_kernels.tolerances import network_tolerance


def fuse(
    model: nn.Module, example_input: Example, backend: str = "auto", dtype: torch.dtype | None = None
) -> FusedNetwork:
    """A packed (or any) CNN as one fused module for inference, with the same answers.

    example_input: (batch, channels, height, width) on the model's device; any batch size stands for all.
    backend: "auto" for the first that works, or the name of an executor: "cuda", "triton", "cudnn", "cpu",
    "eager". dtype: of weights and activations inside, None for the model's; inputs and outputs keep their own
    dtype. On a GPU float32 may be multiplied in TF32 where PyTorch's convolutions are, by default
    (``torch.backends.cudnn.allow_tf32``), and what runs each step is measured once (DSP_KERNELS_TUNE=0: not).

    The model is not changed and shares no memory with the result. Before it is returned, it is compared with
    the model in eval mode, on the example and on random images.
    Raises DSPShapeError if the example is not one tensor of images on the model's device, DSPTraceError if
    the model cannot be traced or run on it, DSPBackendError if the backend cannot run the network, and
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
    example = one_image(model, example_input)
    if isinstance(model, LEAF_TYPES):
        model = nn.Sequential(model)  # torch.fx traces what a module calls, not the module itself
    dtype = dtype or example.dtype
    if backend == "auto" and example.device.type == "cpu":
        warn_if_missing()
    # Modules that stay plain PyTorch are copied in eval mode.
    with evaluating(model):
        # After folding, which is in float64: a copy of every tensor.
        program = plan(trace(model, example)).map_tensors(
            lambda t: t.detach().to(dtype, copy=True) if t.is_floating_point() else t.detach().clone()
        )
    fused = FusedNetwork(program, tuple(example.shape), dtype, example.device, backend)
    names = [executor.name for executor in EXECUTORS.candidates(backend, program, dtype, example.device)]
    for name in names:
        fused.backend = name
        try:
            _verify(fused, model, example)
            break
        except Exception as error:
            if name == names[-1]:
                raise
            warnings.warn(f"fuse tries another backend, because {name} failed: {error}", stacklevel=2)
    return fused


class FusedNetwork(nn.Module):
    """A network that runs a Program; made by ``fuse``. For inference only: always in eval mode.

    Call it with (batch, channels, height, width) of any batch size. ``.to()`` moves it, ``copy.deepcopy``
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
        self,
        program: Program,
        example_shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.program = program
        self.dtype = dtype
        self.device = device
        self.backend = EXECUTORS.choose(backend, program, dtype, device).name
        self._requested_backend = backend
        self._example_shape = example_shape
        self._runners: dict[str, Runner] = {}
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width), floating, on the network's device -> the model's output.

        Feature maps come out in x's memory format. Raises DSPShapeError for any other input.
        """
        if not isinstance(x, Tensor):
            raise DSPShapeError(f"the input is a {type(x).__name__}; expected a tensor of images")
        if x.dim() != 4 or x.shape[1] != self._example_shape[1]:
            raise DSPShapeError(
                f"input has shape {tuple(x.shape)}; expected (batch, {self._example_shape[1]}, height, width)"
            )
        if not x.dtype.is_floating_point or x.device != self.device:
            raise DSPShapeError(
                f"input is {x.dtype} on {x.device}; expected a floating dtype on {self.device}"
            )
        if self.program.check is not None:
            self.program.check(x)
        y = self._runner_for(x)(x)
        if y.dtype != x.dtype:  # .to() costs 3 us even as a no-op
            y = y.to(x.dtype)
        return y.contiguous(memory_format=memory_format_of(x)) if y.dim() == 4 else y.contiguous()

    def _runner_for(self, x: Tensor) -> Runner:
        # A recorder (torch.compile, torch.export, a dispatch mode) has to see PyTorch's own operations.
        recorded = (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._len_torch_dispatch_stack() > 0
            or type(x) is not Tensor
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

        verbose: also what is launched for a batch of the example's size: kernels, tiles, threads.
        """
        executor = EXECUTORS.choose(self.backend, self.program, self.dtype, self.device)
        forms = executor.describe(self.program, verbose)
        plain = sum(isinstance(step, TorchStep) for step in self.program.steps)
        lines = [
            f"fused network: {len(self.program.steps)} steps, {plain} of them plain PyTorch; backend "
            f"{self.backend}, {self.dtype}, {self.program.macs / 1e6:.2f} M multiply-adds per image of "
            f"{'x'.join(map(str, self._example_shape[1:]))}"
        ]
        for step, form in zip(self.program.steps, forms, strict=True):
            shape = self.program.shapes.get(step.output)
            size = "x".join(map(str, shape[1:])) if shape else ""
            lines.append(f"  {step.output:<28} {size:<12} {step.describe()}{f'  [{form}]' if form else ''}")
        return "\n".join(lines)

    def train(self, mode: bool = True) -> FusedNetwork:
        """No-op: the network stays in eval mode, because its norms are folded."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FusedNetwork:
        # .to(), .cuda(), .half() come here.
        program = self.program.map_tensors(fn)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        backend = EXECUTORS.choose(self._requested_backend, program, probe.dtype, probe.device).name
        self.program, self.backend, self.dtype, self.device = program, backend, probe.dtype, probe.device
        self._runners = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Runners are closures, which cannot be pickled.
        return {**self.__dict__, "_runners": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedNetwork:
        program = self.program.map_tensors(torch.clone)
        made = FusedNetwork(program, self._example_shape, self.dtype, self.device, self._requested_backend)
        memo[id(self)] = made
        return made


def _without_autograd(runner: Runner, device_type: str) -> Runner:
    """Outside the caller's autograd and autocast."""

    def run(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            return runner(x)

    return run


def _with_input_dtype(runner: Runner, dtype: torch.dtype) -> Runner:
    return lambda x: runner(x.to(dtype))


def _verify(fused: FusedNetwork, model: nn.Module, example_input: Tensor) -> None:
    """Compare with the model; random images because zeros would hide a wrong weight."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(example_input.shape, generator=generator).to(example_input)
    convs = [step for step in fused.program.steps if isinstance(step, ConvStep)]
    depth = len(convs) + sum(isinstance(step, LinearStep) for step in fused.program.steps)
    reduction = max((weight[0].numel() for step in convs for weight in step.weights), default=1)
    # However exact the fused network is, the model rounds to its own dtype.
    coarsest = max(fused.dtype, example_input.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    if example_input.device.type == "cuda" and uses_tf32(coarsest):
        coarsest = torch.float16  # TF32 has as many bits
    half_sums = fused.dtype == torch.float16 and fused.backend == "cpu" and adds_in_half()
    bound = network_tolerance(coarsest, reduction, depth, half_sums)
    with evaluating(model), torch.no_grad(), torch.autocast(example_input.device.type, enabled=False):
        for images, x in (("the example input", example_input), ("random images", noise)):
            compare_answers(
                model(x.clone()),  # a model may write into its input
                fused(x.clone()),
                bound,
                "the fused network differs from the model",
                images,
                model=model,
                dtype=coarsest,
                advice=". If the model is right, please report this",
            )
