"""Runs a Program on a GPU: one launch per convolution or residual block, one layout, one block of memory, one
CUDA graph.

Per input shape a ``GpuRun`` holds the memory and, if it can be captured, the graph. A batch that is a
multiple of 8 runs in CHWN, any other in NHWC (gpu_layout.py), or filled up to the next multiple of 8 where
blocks are predicted to gain more than that costs. DSP_KERNELS_BLOCKS=0 gives every convolution a launch of
its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.program.steps import ConvStep, Program, Step, TorchStep
from dsp_kernels.run.eager.program import EagerExecutor
from dsp_kernels.run.gpu.blocks import GpuBlocks
from dsp_kernels.run.gpu.graphs import LRU, capture, is_capturing
from dsp_kernels.run.gpu.layout import GPU_KERNELS, GpuConv, GpuLayout, layout_for_batch
from dsp_kernels.run.gpu.memory import Arena, arena_for, value_shapes
from dsp_kernels.run.gpu.steps import EagerGpuConv, step_call

__all__ = ["CudaExecutor", "GpuRun", "GpuRunner"]

# Input shapes whose memory and graph are kept.
MOST_RUNS = 8


class CudaExecutor:
    """See the module's text. kernels: "auto", or the name of the only kernels to use."""

    takes_any_dtype = True

    def __init__(self, name: str = "cuda", kernels: str = "auto") -> None:
        self.name = name
        self.kernels = kernels

    def can_run(self, program: Program, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """On a GPU, when GPU kernels take at least one of the convolutions."""
        if device.type != "cuda":
            return False, f"the network is on {device}; move it and its example to a GPU"
        reasons = []
        for spec in (step.spec for step in program.steps if isinstance(step, ConvStep) and step.weights):
            kernels, reason = _kernels_for(self.kernels, spec, dtype, device, GpuLayout.NHWC)
            if kernels:
                return True, ""
            reasons.append(reason)
        return False, reasons[0] if reasons else "the network has no convolution with weights"

    def prepare(self, program: Program) -> GpuRunner:
        """A function x -> y; see ``Executor.prepare``."""
        return GpuRunner(program, self.kernels)

    def is_native(self, program: Program) -> bool:
        """Never: PyTorch operations are at least around it."""
        return False

    def describe(self, program: Program) -> list[str]:
        """Per step, the kernels and the layout for the example's batch."""
        blocks = GpuBlocks(program, *_kind_of(program), wanted=_blocks_for(self.kernels, None))
        shape = program.shapes[program.input]
        batch = blocks.batch_for(shape)
        layout = layout_for_batch(batch)
        forms = []
        for step in program.steps:
            form = "" if isinstance(step, TorchStep) else f"torch {layout.name}"
            if isinstance(step, ConvStep):
                name, reason = _kernels_for(self.kernels, step.spec, *_kind_of(program), layout)
                form = f"{name} {layout.name}" if name else f"plain PyTorch: {reason}"
            forms.append(form)
        if not blocks.can_run(layout):
            return forms
        place = {step.output: position for position, step in enumerate(program.steps)}
        for plan in blocks.plans(value_shapes(program, (batch, *shape[1:]), _kind_of(program)[0])):
            for member in plan.step.members if plan.step else ():
                forms[place[member.output]] = f"part of {plan.block.output}"
            at = place[plan.block.output]
            forms[at] = plan.describe() if plan.step else f"{forms[at]}; {plan.describe()}"
        return forms


class GpuRunner:
    """x -> y. Calls from several threads and streams are put one after the other on the GPU.

    blocks: whether residual blocks may run as one kernel; None asks DSP_KERNELS_BLOCKS. Inside somebody's own
    CUDA graph it launches with fresh memory, which that graph then owns.
    """

    def __init__(
        self,
        program: Program,
        kernels: str = "auto",
        most_runs: int = MOST_RUNS,
        blocks: bool | None = None,
    ) -> None:
        self._program = program
        self._kernels = kernels
        self._dtype = _kind_of(program)[0]
        self._convs: dict[tuple[GpuLayout, str], GpuConv] = {}
        self._known: set[GpuLayout] = set()
        self._blocks = GpuBlocks(program, *_kind_of(program), _blocks_for(kernels, blocks), most_runs)
        self._runs: LRU[GpuRun] = LRU(most_runs)
        self._plain: Callable[[Tensor], Tensor] | None = None
        self._lock = threading.Lock()
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width) of the Program's device; the answer is the caller's own."""
        if not len(x):
            return self._eager(x.to(self._dtype))
        with self._lock:
            if is_capturing(x.device):
                return self._inside_a_graph(x)
            if x.device.type != "cuda":
                return self._runs.get(tuple(x.shape), lambda: self._make(x))(x)
            with torch.cuda.device(x.device):
                stream = torch.cuda.current_stream()
                if self._done is not None:
                    stream.wait_event(self._done)
                y = self._runs.get(tuple(x.shape), lambda: self._make(x))(x)
                self._done = stream.record_event()
            return y

    def _make(self, x: Tensor) -> GpuRun:
        run = self._new_run(x, may_prepare=True)
        if x.device.type == "cuda":
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            run.capture(x, self._pool)
        return run

    def _new_run(self, x: Tensor, may_prepare: bool) -> GpuRun:
        shape = (self._blocks.batch_for(x.shape), *x.shape[1:])
        layout = layout_for_batch(shape[0])
        if not may_prepare and (layout not in self._known or not self._blocks.knows(shape)):
            raise DSPBackendError(
                f"this network has not run a batch of {len(x)} yet, and its weights cannot be arranged "
                "while a CUDA graph is captured; call it once before"
            )
        program, blocks = self._blocks.program_for(shape)
        self._known.add(layout)
        convs = [blocks.get(step.output) or self._conv_of(step, layout) for step in program.steps]
        return GpuRun(program, convs, shape, x.device, self._dtype, layout)

    def _conv_of(self, step: Step, layout: GpuLayout) -> GpuConv | None:
        """The launcher of a convolution, its weights arranged once per layout; None for other steps."""
        if not isinstance(step, ConvStep):
            return None
        key = layout, step.output
        if key not in self._convs:
            self._convs[key] = _prepare_conv(step, self._kernels, _kind_of(self._program), layout)
        return self._convs[key]

    def _inside_a_graph(self, x: Tensor) -> Tensor:
        return self._new_run(x, may_prepare=False)(x)

    def _eager(self, x: Tensor) -> Tensor:
        self._plain = self._plain or EagerExecutor().prepare(self._program)
        return self._plain(x)


class GpuRun:
    """The Program for one input shape, on memory of its own. An input may have fewer images."""

    def __init__(
        self,
        program: Program,
        convs: list[GpuConv | None],
        shape: Sequence[int],
        device: torch.device,
        dtype: torch.dtype,
        layout: GpuLayout,
    ) -> None:
        self._program = program
        self._layout = layout
        self._images = shape[0]
        shapes = value_shapes(program, shape, dtype)
        self.arena: Arena = arena_for(program, shapes, dtype.itemsize)
        self._memory = torch.empty(self.arena.bytes, dtype=torch.uint8, device=device)
        self._place = {
            name: self._view(offset, shapes[name] or (), dtype) for name, offset in self.arena.offset.items()
        }
        self._calls = [
            step_call(step, layout, conv, shapes, device)
            for step, conv in zip(program.steps, convs, strict=True)
        ]
        self._replay: Callable[[], None] | None = None
        self._answer: Tensor | None = None

    @property
    def is_captured(self) -> bool:
        """Whether calls replay a CUDA graph."""
        return self._replay is not None

    def __call__(self, x: Tensor) -> Tensor:
        """x: of the shape this run was made for, or with fewer images -> a tensor of the caller's own."""
        self._copy_in(x)
        if self._replay is None:
            self._launch()
        else:
            self._replay()
        assert self._answer is not None
        answer = self._answer if len(x) == self._images else self._answer[: len(x)]
        return answer.clone(memory_format=torch.contiguous_format)

    def capture(self, x: Tensor, pool: object) -> None:
        """Capture the launches; without success calls launch one by one."""
        self._copy_in(x)
        self._replay = capture(self._launch, x.device, pool)

    def _copy_in(self, x: Tensor) -> None:
        if x.device.type == "cuda" and not is_capturing(x.device):
            # The memory may be given back while another stream than the one it was taken on still uses it.
            self._memory.record_stream(torch.cuda.current_stream(x.device))
        place = self._layout.as_nchw(self._place[self._program.input])
        place[: len(x)].copy_(x)

    def _launch(self) -> None:
        program = self._program
        values: dict[str, Any] = {program.input: self._place[program.input]}
        for step, call, dead in zip(program.steps, self._calls, program.dying, strict=True):
            place = self._place.get(step.output)
            result = call(values, place)
            values[step.output] = result if place is not None else self._kept_apart(result)
            for name in dead:
                values.pop(name, None)
        answer = values[program.output]
        self._answer = self._layout.as_nchw(answer) if answer.dim() == 4 else answer

    def _view(self, offset: int, nchw: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shape = self._layout.shape(nchw)
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._memory[offset : offset + size].view(dtype).view(shape)

    def _kept_apart(self, result: Any) -> Any:
        """What a step hands on as a view of the arena would be overwritten: the plan does not see it."""
        ours = self._memory.untyped_storage().data_ptr()

        def apart(value: Tensor) -> Tensor:
            return value.clone() if value.untyped_storage().data_ptr() == ours else value

        return pytree.tree_map_only(Tensor, apart, result)


def _kernels_for(
    name: str, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: GpuLayout
) -> tuple[str, str]:
    """The name of the kernels for a convolution, or "" and why there are none."""
    try:
        return GPU_KERNELS.choose(name, spec, dtype, device, layout).name, ""
    except DSPBackendError as error:
        return "", str(error)


def _prepare_conv(
    step: ConvStep, kernels: str, kind: tuple[torch.dtype, torch.device], layout: GpuLayout
) -> GpuConv:
    """The launcher of one convolution."""
    name, _ = _kernels_for(kernels, step.spec, *kind, layout)
    if not name:
        return EagerGpuConv(step, layout)
    family = GPU_KERNELS.choose(name, step.spec, *kind, layout)
    return family.prepare(step.spec, step.weights, step.bias, layout)


def _blocks_for(kernels: str, wanted: bool | None) -> bool | None:
    """Blocks are CUDA kernels: there are none where others were asked for."""
    return wanted if kernels in ("auto", "cuda") else False


def _kind_of(program: Program) -> tuple[torch.dtype, torch.device]:
    """dtype and device of the convolutions' weights."""
    convs = [step for step in program.steps if isinstance(step, ConvStep)]
    weight = next(weight for step in convs for weight in step.weights)
    return weight.dtype, weight.device
