"""The GPU executor: one launch per convolution or residual block, one layout, one arena, one CUDA graph.

Per input shape a ``GpuRun`` holds the memory and, if it can be captured, the graph. What each step runs on is
measured at the first input of a shape (plan.py).
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
from dsp_kernels.program.steps import ConvStep, Program
from dsp_kernels.run.eager.program import EagerExecutor
from dsp_kernels.run.gpu.conv import GPU_KERNELS, warn_of_missing
from dsp_kernels.run.gpu.graphs import capture, is_capturing
from dsp_kernels.run.gpu.layout import GpuLayout, uses_tf32
from dsp_kernels.run.gpu.memory import arena_for
from dsp_kernels.run.gpu.plan import GpuPlan, Planner
from dsp_kernels.run.gpu.tune import Tuner, tuner_for
from dsp_kernels.run.lru import LRU

_MOST_RUNS = 8  # input shapes whose memory and graph are kept


class CudaExecutor:
    """A Program in a CUDA graph per input shape, every step by the fastest of several kernels.

    name: "cuda" chooses among the kernels of csrc/cuda, Triton's and cuDNN's, "triton" among the latter two,
    "cudnn" runs PyTorch's own convolutions.
    """

    takes_any_dtype = True

    def __init__(self, name: str = "cuda") -> None:
        self.name = name

    def can_run(self, program: Program, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """On a GPU, if the first of its kernels support at least one of the convolutions."""
        if device.type != "cuda":
            return False, f"the network is on {device}; move it and its example to a GPU"
        reason = "the network has no convolution with weights"
        for spec in (step.spec for step in program.steps if isinstance(step, ConvStep) and step.weights):
            able = self.name == "cudnn"
            for kernels in GPU_KERNELS:
                if kernels.name == self.name:
                    able, reason = kernels.can_run(spec, dtype, device, GpuLayout.NHWC)
            if able:
                return True, ""
        return False, reason

    def prepare(self, program: Program) -> GpuRunner:
        runner = GpuRunner(program, self.name)
        warn_of_missing(runner.device)
        return runner

    def is_native(self, program: Program) -> bool:
        """Never: PyTorch copies the input and the output."""
        return False

    def describe(self, program: Program, verbose: bool = False) -> list[str]:
        """Per step, what it runs on for the example's shape; verbose: with the parameters of its launch."""
        plan = GpuRunner(program, self.name).plan(program.shapes[program.input])
        return [plan.describe(step.output, verbose) for step in program.steps]


class GpuRunner:
    """x -> y. Concurrent calls from several threads and streams are serialised on the GPU.

    While the caller captures a CUDA graph, it launches on newly allocated memory, which that graph then owns.
    kernels: "auto" for all, or see Planner. make_tuner: (device, what is tuned) -> a tuner.
    """

    def __init__(
        self,
        program: Program,
        kernels: str = "auto",
        make_tuner: Callable[[torch.device, str], Tuner] = tuner_for,
    ) -> None:
        self._program, self._planner, self._make_tuner = program, Planner(program, kernels), make_tuner
        self.device = self._planner.device
        self._runs: LRU[GpuRun] = LRU(_MOST_RUNS)
        # What graphs of the caller read must live as long as this network.
        self._captured: dict[tuple[object, ...], GpuPlan] = {}
        self._lock = threading.Lock()
        self._graph_pool: Any = None
        self._done: torch.cuda.Event | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x: (batch, channels, height, width) on the Program's device; the result is a new tensor."""
        if not len(x):
            return self._eager(x.to(self._planner.dtype))
        with self._lock:
            if is_capturing(x.device):
                return self._run_in_graph(x)(x)
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
        run = self._runs.get(self._key(shape))
        return run is not None and run.is_captured

    def plan(self, shape: Sequence[int]) -> GpuPlan:
        """What runs for an input of this shape; measures it unless that is known."""
        size = "x".join(map(str, shape))
        with self._make_tuner(self.device, f"for an input of {size}") as tuner:
            return self._planner.plan(shape, tuner, lambda plan: GpuRun(plan).launch)

    def _key(self, shape: Sequence[int]) -> tuple[object, ...]:
        return *shape, uses_tf32(self._planner.dtype)

    def _run_for(self, x: Tensor) -> GpuRun:
        return self._runs.get_or_make(self._key(x.shape), lambda: self._captured_run(x))

    def _captured_run(self, x: Tensor) -> GpuRun:
        # What is kept must be writable outside of the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            run = GpuRun(self._captured.get(self._key(x.shape)) or self.plan(x.shape))
            if x.device.type == "cuda":
                self._graph_pool = self._graph_pool or torch.cuda.graph_pool_handle()
                run.capture(x, self._graph_pool)
        return run

    def _run_in_graph(self, x: Tensor) -> GpuRun:
        key = self._key(x.shape)
        run = self._runs.get(key)
        plan = run.plan if run else self._captured.get(key)
        if plan is None:
            raise DSPBackendError(
                f"this network has not run an input of shape {tuple(x.shape)} yet, and its weights cannot be "
                "arranged while a CUDA graph is captured; call it once before"
            )
        self._captured[key] = plan
        return GpuRun(plan)


class GpuRun:
    """A plan with memory of its own. An input may have fewer images than the plan."""

    def __init__(self, plan: GpuPlan) -> None:
        self.plan = plan
        dtype, device = plan.dtype, plan.device
        arena = arena_for(plan.program, plan.shapes, dtype.itemsize)
        self._memory = torch.empty(arena.bytes, dtype=torch.uint8, device=device)
        self._buffers = {
            name: self._view(offset, plan.shapes[name] or (), dtype) for name, offset in arena.offset.items()
        }
        self._replay: Callable[[], None] | None = None
        self._output: Tensor | None = None

    @property
    def is_captured(self) -> bool:
        return self._replay is not None

    def __call__(self, x: Tensor) -> Tensor:
        """x: of the shape this run was made for, or with fewer images -> a new tensor."""
        self._copy_in(x)
        (self._replay or self.launch)()
        assert self._output is not None
        output = self._output if len(x) == self.plan.shape[0] else self._output[: len(x)]
        return output.clone(memory_format=torch.contiguous_format)

    def capture(self, x: Tensor, pool: object) -> None:
        """Capture the launches; if that fails, calls launch them one by one."""
        self._copy_in(x)
        self._replay = capture(self.launch, x.device, pool)

    def _copy_in(self, x: Tensor) -> None:
        if x.device.type == "cuda" and not is_capturing(x.device):
            # Keeps the memory from being freed while another stream than the allocating one uses it.
            self._memory.record_stream(torch.cuda.current_stream(x.device))
        layout = self.plan.layout
        layout.as_nchw(self._buffers[self.plan.program.input])[: len(x)].copy_(x)

    def launch(self) -> None:
        """Everything once, from the input's buffer to the output."""
        program = self.plan.program
        values: dict[str, Any] = {program.input: self._buffers[program.input]}
        for step, call, dead in zip(program.steps, self.plan.calls, program.dying, strict=True):
            buffer = self._buffers.get(step.output)
            result = call(values, buffer)
            values[step.output] = result if buffer is not None else self._outside_arena(result)
            for name in dead:
                values.pop(name, None)
        output = values[program.output]
        self._output = self.plan.layout.as_nchw(output) if output.dim() == 4 else output

    def _view(self, offset: int, nchw: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shape = self.plan.layout.shape(nchw)
        size = torch.Size(shape).numel() * dtype.itemsize
        return self._memory[offset : offset + size].view(dtype).view(shape)

    def _outside_arena(self, result: Any) -> Any:
        """Copies views of the arena: the memory plan does not know them and would overwrite them."""
        arena = self._memory.untyped_storage().data_ptr()

        def outside(value: Tensor) -> Tensor:
            return value.clone() if value.untyped_storage().data_ptr() == arena else value

        return pytree.tree_map_only(Tensor, outside, result)
