"""The GPU executor: one launch per convolution or residual block, one layout, one arena, one CUDA graph.

Per input shape a ``GpuRun`` holds the memory and, if it can be captured, the graph. What each step runs on is
measured at the first input of a shape (plan.py). Of several inputs, it is the shapes of all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.program.steps import ConvStep, Program, map_nested
from dsp_kernels.run.eager.program import EagerExecutor
from dsp_kernels.run.gpu.conv import GPU_KERNELS, warn_of_missing
from dsp_kernels.run.gpu.graphs import capture, is_capturing
from dsp_kernels.run.gpu.layout import uses_tf32
from dsp_kernels.run.gpu.memory import arena_for
from dsp_kernels.run.gpu.plan import GpuPlan, Planner, Sizes
from dsp_kernels.run.gpu.tune import Tuner, tuner_for
from dsp_kernels.run.lru import LRU

_MOST_RUNS = 8  # shapes of inputs whose memory and graph are kept


class CudaExecutor:
    """A Program in a CUDA graph per input shape, every step by the fastest of several kernels.

    name: "cuda" chooses among the kernels of csrc/cuda, Triton's and cuDNN's, "triton" among the latter two,
    "cudnn" runs PyTorch's own convolutions.
    """

    takes_any_dtype = True

    def __init__(self, name: str = "cuda") -> None:
        self.name = name
        # By the identity of its Program, which it keeps alive.
        self._runners: WeakValueDictionary[int, GpuRunner] = WeakValueDictionary()

    def can_run(self, program: Program, dtype: torch.dtype, device: torch.device) -> tuple[bool, str]:
        """On a GPU, if the first of its kernels support at least one of the convolutions."""
        if device.type != "cuda":
            return False, f"the network is on {device}; move it and its example to a GPU"
        if program.is_integer:
            return False, "its kernels have no integer steps"
        reason = "the network has no convolution with weights"
        for spec in (step.spec for step in program.steps if isinstance(step, ConvStep) and step.weights):
            able = self.name == "cudnn"
            for kernels in GPU_KERNELS:
                if kernels.name == self.name:
                    able, reason = kernels.can_run(spec, dtype, device)
            if able:
                return True, ""
        return False, reason

    def prepare(self, program: Program) -> GpuRunner:
        runner = self._runners[id(program)] = GpuRunner(program, self.name)
        warn_of_missing(runner.device)
        return runner

    def is_native(self, program: Program) -> bool:
        """Never: PyTorch copies the input and the output."""
        return False

    def describe(self, program: Program, verbose: bool = False) -> list[str]:
        """Per step, what it runs on for the example's shape; verbose: with the parameters of its launch."""
        runner = self._runners.get(id(program)) or GpuRunner(program, self.name)
        plan = runner.plan([program.shapes[name] for name in program.inputs])
        return [plan.describe(step.output, verbose) for step in program.steps]


class GpuRunner:
    """A Runner. Concurrent calls from several threads and streams are serialised on the GPU.

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

    def __call__(self, inputs: Sequence[Tensor]) -> list[Any]:
        """inputs: on the Program's device; the results are new tensors."""
        if not len(inputs[0]):
            return EagerExecutor().prepare(self._program)([x.to(self._planner.dtype) for x in inputs])
        with self._lock:
            if is_capturing(self.device):
                return self._run_in_graph(inputs)(inputs)
            if self.device.type != "cuda":
                return self._run_for(inputs)(inputs)
            with torch.cuda.device(self.device):
                stream = torch.cuda.current_stream()
                if self._done is not None:
                    stream.wait_event(self._done)
                run = self._run_for(inputs)
                run.memory.record_stream(stream)  # not freed before this call has ended
                results = run(inputs)
                self._done = stream.record_event()
            return results

    def is_captured(self, inputs: Sizes) -> bool:
        """Whether calls with inputs of these shapes replay a CUDA graph."""
        run = self._runs.get(self._key(inputs))
        return run is not None and run.replay is not None

    def plan(self, inputs: Sizes) -> GpuPlan:
        """What runs for inputs of these shapes; measures it unless that is known."""
        if kept := self._kept(self._key(inputs)):
            return kept
        sizes = " and ".join("x".join(map(str, shape)) for shape in inputs)
        with self._make_tuner(self.device, f"for an input of {sizes}") as tuner:
            return self._planner.plan(inputs, tuner, lambda plan: GpuRun(plan).launch)

    def _kept(self, key: tuple[object, ...]) -> GpuPlan | None:
        run = self._runs.get(key)
        return run.plan if run else self._captured.get(key)

    def _key(self, inputs: Sizes) -> tuple[object, ...]:
        return *map(tuple, inputs), uses_tf32(self._planner.dtype)

    def _run_for(self, inputs: Sequence[Tensor]) -> GpuRun:
        shapes = [x.shape for x in inputs]
        return self._runs.get_or_make(self._key(shapes), lambda: self._captured_run(inputs, shapes))

    def _captured_run(self, inputs: Sequence[Tensor], shapes: Sizes) -> GpuRun:
        # What is kept must be writable outside of the caller's inference mode.
        with torch.inference_mode(False), torch.no_grad():
            run = GpuRun(self.plan(shapes))
            if self.device.type == "cuda":
                self._graph_pool = self._graph_pool or torch.cuda.graph_pool_handle()
                run.capture(inputs, self._graph_pool)
        return run

    def _run_in_graph(self, inputs: Sequence[Tensor]) -> GpuRun:
        shapes = [tuple(x.shape) for x in inputs]
        key = self._key(shapes)
        plan = self._kept(key)
        if plan is None:
            raise DSPBackendError(
                f"this network has not run an input of shape {' and '.join(map(str, shapes))} yet, and its "
                "weights cannot be arranged while a CUDA graph is captured; call it once before"
            )
        self._captured[key] = plan
        return GpuRun(plan)


class GpuRun:
    """A plan with memory of its own. Inputs may have fewer images than the plan."""

    def __init__(self, plan: GpuPlan) -> None:
        self.plan = plan
        dtype, device = plan.dtype, plan.device
        arena = arena_for(plan.program, plan.shapes, dtype.itemsize)
        self.memory = torch.empty(arena.bytes, dtype=torch.uint8, device=device)
        self._buffers = {
            name: self._view(offset, plan.shapes[name] or (), dtype) for name, offset in arena.offset.items()
        }
        self._dying = plan.program.dying
        self.replay: Callable[[], None] | None = None  # of the captured launches
        self._outputs: list[Any] = []

    def __call__(self, inputs: Sequence[Tensor]) -> list[Any]:
        """inputs: of the shapes this run was made for, or with fewer images -> new tensors."""
        self._copy_in(inputs)
        (self.replay or self.launch)()
        batch = len(inputs[0])

        def result(part: Any) -> Any:
            if not isinstance(part, Tensor):
                return part
            part = part if batch == self.plan.images else part[:batch]
            return part.clone(memory_format=torch.contiguous_format)

        results: list[Any] = map_nested(result, self._outputs)
        return results

    def capture(self, inputs: Sequence[Tensor], pool: object) -> None:
        """Capture the launches; if that fails, calls launch them one by one."""
        self._copy_in(inputs)
        self.replay = capture(self.launch, self.plan.device, pool)

    def _copy_in(self, inputs: Sequence[Tensor]) -> None:
        for name, x in zip(self.plan.program.inputs, inputs, strict=True):
            self._as_nchw(self._buffers[name])[: len(x)].copy_(x)

    def _as_nchw(self, part: Any) -> Any:
        return self.plan.layout.as_nchw(part) if isinstance(part, Tensor) and part.dim() == 4 else part

    def launch(self) -> None:
        """Everything once, from the buffers of the inputs to the outputs."""
        program = self.plan.program
        values: dict[str, Any] = {name: self._buffers[name] for name in program.inputs}
        for step, call, dead in zip(program.steps, self.plan.calls, self._dying, strict=True):
            buffer = self._buffers.get(step.output)
            result = call(values, buffer)
            values[step.output] = result if buffer is not None else self._outside_arena(result)
            for name in dead:
                values.pop(name, None)
        self._outputs = map_nested(self._as_nchw, [values[name] for name in program.outputs])

    def _view(self, offset: int, nchw: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        shape = self.plan.layout.shape(nchw) if len(nchw) == 4 else nchw
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.memory[offset : offset + size].view(dtype).view(shape)

    def _outside_arena(self, result: Any) -> Any:
        """Copies views of the arena: the memory plan does not know them and would overwrite them."""
        arena = self.memory.untyped_storage().data_ptr()

        def outside(value: Tensor) -> Tensor:
            return value.clone() if value.untyped_storage().data_ptr() == arena else value

        return pytree.tree_map_only(Tensor, outside, result)
