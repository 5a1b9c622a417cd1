"""Where one call of an engine spends its time, layer by layer."""

import re
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from dsp_kernels.errors import DSPError
from dsp_kernels.graph.network import trace
from dsp_kernels.run.programs import EXECUTORS

from ..engines import ENGINES
from ..engines.base import converted
from ..engines.fused import Fused
from ..engines.onnx_engines import OpenVINO
from ..engines.pytorch import TorchEager
from .floors import part_floor, program_of
from .peaks import Peaks
from .timing import Timer, TimingRules, measure

_CALLS = 5
_STEP_RULES = TimingRules(rounds=15, warmup=0.01, gap=0.0, burst=0.005)


@dataclass(frozen=True)
class Part:
    """A layer or step: its seconds in one call, and its floor as a kernel of its own (None without FLOPs)."""

    name: str
    seconds: float
    floor: float | None = None


def profile_engine(name: str, model: nn.Module, x: Tensor, peaks: Peaks) -> list[Part]:
    """The parts of one call, longest first; steps of a fused network in their order.

    x: (batch, channels, height, width); peaks: of x's device. Raises DSPError if the engine has no profile.
    """
    engine = replace(ENGINES[name], images=x)
    if isinstance(engine, Fused):
        return _steps(engine, model, x, peaks)
    if isinstance(engine, OpenVINO):
        found = engine.profile(model, x)
    elif isinstance(engine, TorchEager):
        found = _operations(engine, model, x)
    else:
        raise DSPError(f"engine {name!r} has no profile; torch, torch-nhwc, openvino and fused ones have")
    floors = _layer_floors(model, x, peaks, engine.dtype)
    parts = [Part(part, seconds, floors.get(_module_path(part))) for part, seconds in found]
    return sorted(parts, key=lambda part: -part.seconds)


def _steps(engine: Fused, model: nn.Module, x: Tensor, peaks: Peaks) -> list[Part]:
    """Seconds of each step: the time of the network up to it, minus that up to the step before.

    An executor has no clock between its steps. A part includes the change in the cost of returning a result.
    """
    fused = engine.fused(model, x)
    program, dtype = fused.program, fused.dtype
    executor = EXECUTORS.choose(engine.backend, program, dtype, x.device)
    x = x.to(dtype)
    timers = {}
    for count, step in enumerate(program.steps, 1):
        run = executor.prepare(replace(program, steps=program.steps[:count], outputs=(step.output,)))
        call = torch.inference_mode()(lambda run=run: run([x]))
        timers[step.output] = Timer(call, torch.cuda.synchronize if x.is_cuda else None)
    samples = measure(timers, _STEP_RULES)
    parts, before = [], 0.0
    for step in program.steps:
        end = samples[step.output].median
        floor = part_floor(program, [step], len(x), peaks, dtype)
        parts.append(Part(f"{step.output}: {step.describe()}", end - before, floor))
        before = end
    return parts


def _operations(engine: TorchEager, model: nn.Module, x: Tensor) -> list[tuple[str, float]]:
    """(module path or name, median seconds) of each operation of the traced network."""
    network = converted(model, engine.dtype, engine.layout)
    x = x.to(engine.dtype).contiguous(memory_format=engine.layout)
    taken: dict[str, list[float]] = defaultdict(list)

    def now() -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    class Timed(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            began = now()
            result = super().run_node(n)
            if n.op.startswith("call"):
                taken[str(n.target) if n.op == "call_module" else n.name].append(now() - began)
            return result

    with torch.inference_mode():
        timed = Timed(trace(network, x[:1]).graph_module)
        for _ in range(_CALLS):
            timed.run(x)
    return [(name, statistics.median(seconds)) for name, seconds in taken.items()]


def _layer_floors(model: nn.Module, x: Tensor, peaks: Peaks, dtype: torch.dtype) -> dict[str, float]:
    """By module path, of every convolution and linear layer; empty if the peak is not known."""
    if not peaks.knows(dtype):
        return {}
    network = trace(model, x[:1])
    found = {}
    for node in network.of_kind("conv", "linear"):
        if node.module is not None and (shape := network[node.inputs[0]].shape) is not None:
            layer = program_of(nn.Sequential(node.module), torch.zeros(shape, device=x.device))
            found[node.path] = part_floor(layer, layer.steps, len(x), peaks, dtype)
    return found


def _module_path(part: str) -> str:
    """Of a part named by module path, or as the ONNX exporter does: /stage_1/stage_1.0/conv_a/Conv ..."""
    if found := re.match(r"/(.+?)/(?:Conv|Gemm)", part):
        return ".".join(scope.rpartition(".")[2] for scope in found[1].split("/"))
    return part
