"""fuse(model, example_input): a packed model in, a network that runs a Program out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from dsp_kernels.errors import DSPBackendError, DSPShapeError, DSPVerificationError
from dsp_kernels.graph.compare import check_finite
from dsp_kernels.graph.inputs import Example, one_image
from dsp_kernels.graph.network import evaluating, trace
from dsp_kernels.graph.operations import LEAF_TYPES
from dsp_kernels.program.planner import plan
from dsp_kernels.program.steps import ConvStep, LinearStep, Program, TorchStep
from dsp_kernels.run.cpu.extension import adds_in_half, warn_if_missing
from dsp_kernels.run.programs import EXECUTORS, Runner
from dsp_kernels.tolerances import network_tolerance

__all__ = ["FusedNetwork", "fuse"]


def fuse(
    model: nn.Module, example_input: Example, backend: str = "auto", dtype: torch.dtype | None = None
) -> FusedNetwork:
    """Trace a packed (or any) CNN once and return it as one fused module for inference.

    example_input: (batch, channels, height, width) on the model's device; its batch size does not matter.
    backend: "auto", or the name of an executor. dtype: of weights and activations inside; None keeps the
    model's. Input and output keep their own dtype.

    The model itself is not changed, and the result shares no memory with it. It is compared with the model
    (in eval mode) on the example and on random images before it is returned.
    Raises DSPShapeError if the example is not one tensor of images there, DSPTraceError if the model cannot
    be traced or run on it, DSPBackendError if the backend cannot run it, DSPVerificationError if the answers
    differ by more than rounding.
    """
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise DSPBackendError(f"dtype is {dtype!r}; expected a torch.dtype, as torch.bfloat16")
    example = one_image(model, example_input)
    if isinstance(model, LEAF_TYPES):
        model = nn.Sequential(model)  # torch.fx traces what a module calls, not the module itself
    dtype = dtype or example.dtype
    if backend == "auto" and example.device.type == "cpu":
        warn_if_missing()
    # Modules that stay plain PyTorch are copied in the mode in which they are to run.
    with evaluating(model):
        # Folding was done in float64; from here on the Program owns its tensors.
        program = plan(trace(model, example)).map_tensors(
            lambda t: t.detach().to(dtype, copy=True) if t.is_floating_point() else t.detach().clone()
        )
    fused = FusedNetwork(program, tuple(example.shape), dtype, example.device, backend)
    _verify(fused, model, example)
    return fused


class FusedNetwork(nn.Module):
    """A network that runs a Program; made by ``fuse``. Inference only, always in eval mode.

    Input (batch, channels, height, width) with any batch size; output as the original model's. ``.to()``
    moves it, ``copy.deepcopy`` copies it. It holds no parameters: save the packed model instead.
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
        self._asked_backend = backend
        self._example_shape = example_shape
        self._runners: dict[str, Runner] = {}
        super().train(False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width), floating, on this network's device -> the model's answer."""
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
        y = self._runner_for(x)(x)
        return y if y.dtype == x.dtype else y.to(x.dtype)  # .to() takes 3 us also where it has nothing to do

    def _runner_for(self, x: Tensor) -> Runner:
        # Whoever records operations instead of running them has to see PyTorch's own.
        recorded = (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or torch._C._len_torch_dispatch_stack() > 0
            or type(x) is not Tensor
        )
        runners = self._runners  # read first: ``_apply``, in another thread perhaps, replaces it last
        name = "eager" if recorded else self.backend
        runner = runners.get(name)
        if runner is None:
            executor = EXECUTORS.choose(name, self.program, self.dtype, self.device)
            # Kept for later calls: made under a recorder, its weights could be fake and its work recorded.
            plain = nullcontext() if torch.compiler.is_dynamo_compiling() else _disable_current_modes()
            with plain:
                runner = executor.prepare(self.program)
            if not executor.takes_any_dtype:
                runner = _converting(runner, self.dtype)
            if not executor.is_native(self.program):
                runner = _alone(runner, self.device.type)
            runners[name] = runner
        return runner

    def explain(self) -> str:
        """One line per step: what was fused, how it runs, and what stays ordinary PyTorch."""
        executor = EXECUTORS.choose(self.backend, self.program, self.dtype, self.device)
        forms = executor.describe(self.program)
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
        """Stays in eval mode: norms are folded and cannot be trained."""
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> FusedNetwork:
        # .to(), .cuda(), .half() come here.
        program = self.program.map_tensors(fn)
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        backend = EXECUTORS.choose(self._asked_backend, program, probe.dtype, probe.device).name
        self.program, self.backend, self.dtype, self.device = program, backend, probe.dtype, probe.device
        self._runners = {}
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A runner is made of closures; the copy makes its own.
        return {**self.__dict__, "_runners": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> FusedNetwork:
        program = self.program.map_tensors(torch.clone)
        made = FusedNetwork(program, self._example_shape, self.dtype, self.device, self._asked_backend)
        memo[id(self)] = made
        return made


def _alone(runner: Runner, device_type: str) -> Runner:
    """Without the caller's autograd and autocast."""

    def run(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            return runner(x)

    return run


def _converting(runner: Runner, dtype: torch.dtype) -> Runner:
    return lambda x: runner(x.to(dtype))


def _verify(fused: FusedNetwork, model: nn.Module, example_input: Tensor) -> None:
    """Compare with the model it was made from; an example of zeros alone would hide a wrong weight."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(example_input.shape, generator=generator).to(example_input)
    convs = [step for step in fused.program.steps if isinstance(step, ConvStep)]
    depth = len(convs) + sum(isinstance(step, LinearStep) for step in fused.program.steps)
    reductions = [weight[0].numel() for step in convs for weight in step.weights]
    # The model's own answer is rounded as its numbers are, however exact the network inside is.
    rounded = max(fused.dtype, example_input.dtype, key=lambda dtype: torch.finfo(dtype).eps)
    half_sums = fused.dtype == torch.float16 and fused.backend == "cpu" and adds_in_half()
    bound = network_tolerance(rounded, max(reductions, default=1), depth, half_sums)
    # Under somebody's autocast the model itself would be the one that rounds.
    plain = torch.autocast(example_input.device.type, enabled=False)
    with evaluating(model), torch.no_grad(), plain:
        for what, x in (("the example input", example_input), ("random images", noise)):
            expected, got = model(x.clone()), fused(x.clone())  # a model may write into its input
            check_finite(model, [expected], what)
            scale = expected.abs().max().item() if expected.numel() else 0.0
            error = (expected - got).abs().max().item() if expected.numel() else 0.0
            if not error <= bound * max(scale, torch.finfo(rounded).tiny):
                raise DSPVerificationError(
                    f"the fused network differs from the model on {what} by {error:.3g} (largest output "
                    f"{scale:.3g}, allowed {bound * scale:.3g}). If the model is right, please report this"
                )
