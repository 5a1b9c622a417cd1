"""Where one call of an engine spends its time, per layer where the engine can tell, else per operation."""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels import fuse
from dsp_kernels.graph.network import trace
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.run.programs import EXECUTORS

from ..engines import ENGINES, Runner
from ..engines.fused import Fused
from ..engines.torch_eager import TorchEager
from .floors import program_of, step_floors
from .peaks import Peaks
from .timing import LocalTimer, Timer, TimingRules, measure

__all__ = ["Part", "profile_engine"]

_CALLS = 5
_STEP_ROUNDS = 15


@dataclass(frozen=True)
class Part:
    """name: of a layer, step or operation; seconds: of it in one call; floor: the least it could take here,
    as a kernel of its own, None where the part is no layer with multiply-adds.
    """

    name: str
    seconds: float
    floor: float | None = None


def profile_engine(name: str, model: nn.Module, x: Tensor, peaks: Peaks) -> list[Part]:
    """Where one call spends its time, longest first; steps of a fused network in their order.

    x: (batch, channels, height, width); peaks: of the device that x is on.
    """
    engine = ENGINES[name]
    if isinstance(engine, Fused):
        return _steps(engine, model, x, peaks)
    own = getattr(engine, "profile", None)
    if own is not None:
        found = own(model, x)
    elif isinstance(engine, TorchEager):
        found = _layers(model, x, engine.channels_last)
    else:
        found = _operations(engine.prepare(model, x), x)
    least = _layer_floors(model, x, peaks, engine.dtype)
    parts = [Part(part, seconds, _floor_of(part, least)) for part, seconds in found]
    return sorted(parts, key=lambda part: -part.seconds)


def _steps(engine: Fused, model: nn.Module, x: Tensor, peaks: Peaks) -> list[Part]:
    """Seconds of each step: what the network up to it takes, less what it takes up to the step before.

    An executor has no clock between its steps, so every beginning of the Program is a network of its own,
    and all of them are timed in turn. A part holds the change in the cost of handing out its result.
    """
    fused = fuse(model, x, backend=engine.backend, dtype=engine.dtype)
    program = fused.program
    executor = EXECUTORS.choose(engine.backend, program, engine.dtype, x.device)
    x = x.to(engine.dtype)
    timers: dict[str, Timer] = {}
    for count in range(1, len(program.steps) + 1):
        beginning = replace(program, steps=program.steps[:count], output=program.steps[count - 1].output)
        run = executor.prepare(beginning)
        timers[str(count)] = LocalTimer(
            partial(_quiet, run, x), torch.cuda.synchronize if x.is_cuda else None
        )
    samples = measure(timers, TimingRules(rounds=_STEP_ROUNDS, warmup=0.01, gap=0.0, burst=0.005))
    ends = [0.0, *(samples[name].median for name in timers)]
    least = step_floors(program, len(x), peaks, engine.dtype)
    return [
        Part(f"{step.output}: {step.describe()}", after - before, floor)
        for step, before, after, floor in zip(program.steps, ends[:-1], ends[1:], least, strict=True)
    ]


def _quiet(run: Runner, x: Tensor) -> None:
    with torch.inference_mode():
        run(x)


def _layer_floors(model: nn.Module, x: Tensor, peaks: Peaks, dtype: torch.dtype) -> dict[str, float]:
    """By module path, of every convolution and linear layer; empty where the peak is not known."""
    if str(dtype).removeprefix("torch.") not in peaks.flops:
        return {}
    network = trace(model, x[:1])
    found = {}
    for node in network.of_kind("conv", "linear"):
        if node.module is not None and (shape := network[node.inputs[0]].shape) is not None:
            alone = program_of(nn.Sequential(node.module), torch.zeros(shape, device=x.device))
            found[node.path] = sum(step_floors(alone, len(x), peaks, dtype))
    return found


def _floor_of(part: str, least: Mapping[str, float]) -> float | None:
    """Engines name a layer by its path, or as the ONNX exporter does: /stage_1/stage_1.0/conv_a/Conv ..."""
    for path, floor in least.items():
        scope = _onnx_scope(path)
        if part == path or (part.startswith(scope) and part[len(scope) :].startswith(("Conv", "Gemm"))):
            return floor
    return None


def _onnx_scope(path: str) -> str:
    names: list[str] = []
    for name in path.split("."):
        names.append(f"{names[-1]}.{name}" if name.isdigit() and names else name)
    return "/" + "/".join(names) + "/"


def _layers(model: nn.Module, x: Tensor, channels_last: bool) -> list[tuple[str, float]]:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = copy.deepcopy(model).eval().to(memory_format=layout)
    started: dict[str, float] = {}
    taken: dict[str, list[float]] = defaultdict(list)
    wait = torch.cuda.synchronize if x.is_cuda else _nothing

    def before(name: str) -> Any:
        def hook(*_: Any) -> None:
            wait()
            started[name] = time.perf_counter()

        return hook

    def after(name: str) -> Any:
        def hook(*_: Any) -> None:
            wait()
            taken[name].append(time.perf_counter() - started[name])

        return hook

    for name, module in network.named_modules():
        parent = name.rpartition(".")[0]
        inside_packed = parent and isinstance(network.get_submodule(parent), PackedConv2d)
        if (isinstance(module, PackedConv2d) or not list(module.children())) and not inside_packed:
            module.register_forward_pre_hook(before(name))
            module.register_forward_hook(after(name))
    with torch.inference_mode():
        for _ in range(_CALLS):
            network(x.contiguous(memory_format=layout))
    return [(name, statistics.median(seconds)) for name, seconds in taken.items()]


def _operations(run: Any, x: Tensor) -> list[tuple[str, float]]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if x.is_cuda else []
    run(x)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(_CALLS):
            run(x)
    field = "self_device_time_total" if x.is_cuda else "self_cpu_time_total"
    return [(event.key, 1e-6 * getattr(event, field) / _CALLS) for event in profiler.key_averages()]


def _nothing() -> None:
    pass
