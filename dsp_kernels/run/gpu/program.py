"""The GPU executor: one launch per convolution or residual block, one layout, one arena, one CUDA graph.

Per input shape a ``GpuRun`` holds the memory and, if it can be captured, the graph. A batch that is a
multiple of 8 runs in CHWN, any other in NHWC (layout.py), or padded to the next multiple of 8 where running
blocks is predicted to gain more than the padding costs. DSP_KERNELS_BLOCKS=0 runs every convolution as its
own kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.program.steps import ConvStep, Program, Step, TorchStep
from dsp_kernels.run.eager.program import EagerExecutor
from dsp_kernels.run.gpu.conv import GPU_KERNELS
from dsp_kernels.run.gpu.cuda.blocks.plan import BlockPlanner, blocks_wanted
from dsp_kernels.run.gpu.graphs import capture, is_capturing
from dsp_kernels.run.gpu.layout import GpuConv, GpuKernels, GpuLayout, layout_for_batch
from dsp_kernels.run.gpu.memory import arena_for, value_shapes
from dsp_kernels.run.gpu.steps import eager_conv, step_call
from dsp_kernels.run.lru import LRU

_MOST_RUNS = 8  # input shapes whose memory and graph are kept


class CudaExecutor:
    """GPU kernels: the first family that supports a convolution ("cuda"), or only the family of this name."""

    takes_any_dtype = True

    def __init__(self, name: str = "cuda") -> None:
        self.name = name
        self._kernels = "auto" if name == "cuda" else name

    def can_run(self, program: Program, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """On a GPU, if its kernels support at least one of the convolutions."""
        if device.type != "cuda":
            return False, f"the network is on {device}; move it and its example to a GPU"
        reasons = []
        for spec in (step.spec for step in program.steps if isinstance(step, ConvStep) and step.weights):
            kernels, reason = _kernels_for(self._kernels, spec, dtype, device, GpuLayout.NHWC)
            if kernels:
                return True, ""
            reasons.append(reason)
        return False, reasons[0] if reasons else "the network has no convolution with weights"

    def prepare(self, program: Program) -> GpuRunner:
        return GpuRunner(program, self._kernels)

    def is_native(self, program: Program) -> bool:
        """Never: PyTorch copies the input and the output."""
        return False

    def describe(self, program: Program, verbose: bool = False) -> list[str]:
        """Per step, its kernels and layout for the example's batch."""
        dtype, device = _dtype_and_device(program)
        blocks = _block_planner(program, self._kernels)
        shape = program.shapes[program.input]
        batch = blocks.batch_for(shape)
        layout = layout_for_batch(batch)
        forms = []
        for step in program.steps:
            form = "" if isinstance(step, TorchStep) else f"torch {layout.name}"
            if isinstance(step, ConvStep):
                kernels, reason = _kernels_for(self._kernels, step.spec, dtype, device, layout)
                form = f"{kernels.name} {layout.name}" if kernels else f"plain PyTorch: {reason}"
            forms.append(form)
        if not blocks.can_run(layout):
            return forms
        position = {step.output: number for number, step in enumerate(program.steps)}
        for plan in blocks.plans(value_shapes(program, (batch, *shape[1:]), dtype)):
            for member in plan.step.members if plan.step else ():
                forms[position[member.output]] = f"part of {plan.block.output}"
            last = position[plan.block.output]
            forms[last] = plan.describe() if plan.step else f"{forms[last]}; {plan.describe()}"
        return forms


class GpuRunner:
    """x -> y. Concurrent calls from several threads and streams are serialised on the GPU.

    While the caller captures a CUDA graph, it launches on newly allocated memory, which that graph then owns.
    """

    def __init__(self, program: Program, kernels: str = "auto") -> None:
        self._program = program
        self._kernels = kernels
        self._dtype, self._device = _dtype_and_device(program)
        self._convs: dict[tuple[GpuLayout, str], GpuConv] = {}
        self._prepared: set[GpuLayout] = set()
        self._blocks = _block_planner(program, kernels)
        self._runs: LRU[GpuRun] = LRU(_MOST_RUNS)
        self._lock = threading.Lock()
        self._graph_pool: Any = None
        self._done: torch.cuda.Event | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width) on the Program's device; the result is a new tensor."""
        if not len(x):
            return self._eager(x.to(self._dtype))
        with self._lock:
            if is_capturing(x.device):
                return self._new_run(x, may_prepare=False)(x)
            if x.device.type != "cuda":
                return self._run_for(x)(x)
            with torch.cuda.device(x.device):
                stream = torch.cuda.current_stream()
                if self._done is not None:
                    stream.wait_event(self._done)
                y = self._run_for(x)(x)
                self._done = stream.record_event()
            return y

    @cached_property
    def _eager(self) -> Callable[[Tensor], Tensor]:
        return EagerExecutor().prepare(self._program)

    def is_captured(self, shape: Sequence[int]) -> bool:
        """Whether calls with an input of this shape replay a CUDA graph."""
        run = self._runs.get(tuple(shape))
        return run is not None and run.is_captured

    def _run_for(self, x: Tensor) -> GpuRun:
        return self._runs.get_or_make(tuple(x.shape), lambda: self._captured_run(x))

    def _captured_run(self, x: Tensor) -> GpuRun:
        run = self._new_run(x, may_prepare=True)
        if x.device.type == "cuda":
            self._graph_pool = self._graph_pool or torch.cuda.graph_pool_handle()
            run.capture(x, self._graph_pool)
        return run

    def _new_run(self, x: Tensor, may_prepare: bool) -> GpuRun:
        shape = (self._blocks.batch_for(x.shape), *x.shape[1:])
        layout = layout_for_batch(shape[0])
        if not may_prepare and (layout not in self._prepared or not self._blocks.is_planned(shape)):
            raise DSPBackendError(
                f"this network has not run a batch of {len(x)} yet, and its weights cannot be arranged "
                "while a CUDA graph is captured; call it once before"
            )
        program, blocks = self._blocks.program_for(shape)
        self._prepared.add(layout)
        convs = [blocks.get(step.output) or self._conv_of(step, layout) for step in program.steps]
        return GpuRun(program, convs, shape, x.device, self._dtype, layout)

    def _conv_of(self, step: Step, layout: GpuLayout) -> GpuConv | None:
        """The launcher of a convolution, its weights arranged once per layout; None for other steps."""
        if not isinstance(step, ConvStep):
            return None
        key = layout, step.output
        if key not in self._convs:
            kernels, _ = _kernels_for(self._kernels, step.spec, self._dtype, self._device, layout)
            self._convs[key] = (
                kernels.prepare(step.spec, step.weights, step.bias, layout)
                if kernels
                else eager_conv(step, layout)
            )
        return self._convs[key]


class GpuRun:
    """The Program for one input shape, with memory of its own. An input may have fewer images."""

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
        arena = arena_for(program, shapes, dtype.itemsize)
        self._memory = torch.empty(arena.bytes, dtype=torch.uint8, device=device)
        self._buffers = {
            name: self._view(offset, shapes[name] or (), dtype) for name, offset in arena.offset.items()
        }
        self._calls = [
            step_call(step, layout, conv, shapes, device)
            for step, conv in zip(program.steps, convs, strict=True)
        ]
        self._replay: Callable[[], None] | None = None
        self._output: Tensor | None = None

    @property
    def is_captured(self) -> bool:
        return self._replay is not None

    def __call__(self, x: Tensor) -> Tensor:
        """x: of the shape this run was made for, or with fewer images -> a new tensor."""
        self._copy_in(x)
        (self._replay or self._launch)()
        assert self._output is not None
        output = self._output if len(x) == self._images else self._output[: len(x)]
        return output.clone(memory_format=torch.contiguous_format)

    def capture(self, x: Tensor, pool: object) -> None:
        """Capture the launches; if that fails, calls launch them one by one."""
        self._copy_in(x)
        self._replay = capture(self._launch, x.device, pool)

    def _copy_in(self, x: Tensor) -> None:
        if x.device.type == "cuda" and not is_capturing(x.device):
            # Keeps the memory from being freed while another stream than the allocating one uses it.
            self._memory.record_stream(torch.cuda.current_stream(x.device))
        self._layout.as_nchw(self._buffers[self._program.input])[: len(x)].copy_(x)

    def _launch(self) -> None:
        program = self._program
        values: dict[str, Any] = {program.input: self._buffers[program.input]}
        for step, call, dead in zip(program.steps, self._calls, program.dying, strict=True):
            buffer = self._buffers.get(step.output)
            result = call(values, buffer)
            values[step.output] = result if buffer is not None else self._outside_arena(result)
            for name in dead:
                values.pop(name, None)
        output = values[program.output]
        self._output = self._layout.as_nchw(output) if output.dim() == 4 else output

    def _view(self, offset: int, nchw: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shape = self._layout.shape(nchw)
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._memory[offset : offset + size].view(dtype).view(shape)

    def _outside_arena(self, result: Any) -> Any:
        """Copies views of the arena: the memory plan does not know them and would overwrite them."""
        arena = self._memory.untyped_storage().data_ptr()

        def outside(value: Tensor) -> Tensor:
            return value.clone() if value.untyped_storage().data_ptr() == arena else value

        return pytree.tree_map_only(Tensor, outside, result)


def _kernels_for(
    name: str, spec: ConvSpec, dtype: torch.dtype, device: torch.device, layout: GpuLayout
) -> tuple[GpuKernels | None, str]:
    """The kernels for a convolution, or None and the reason."""
    try:
        return GPU_KERNELS.choose(name, spec, dtype, device, layout), ""
    except DSPBackendError as error:
        return None, str(error)


def _block_planner(program: Program, kernels: str) -> BlockPlanner:
    """Blocks are CUDA C++ kernels: none run where only other kernels may."""
    wanted = kernels in ("auto", "cuda") and blocks_wanted()
    return BlockPlanner(program, *_dtype_and_device(program), wanted)


def _dtype_and_device(program: Program) -> tuple[torch.dtype, torch.device]:
    """Of the convolutions' weights."""
    weights = (weight for step in program.steps if isinstance(step, ConvStep) for weight in step.weights)
    weight = next(weights)
    return weight.dtype, weight.device
