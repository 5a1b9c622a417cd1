"""Where one call of an engine spends its time, per layer where the engine can tell, else per operation."""

from __future__ import annotations

import copy
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from dsp_kernels.packed import PackedConv2d

from .engines import ENGINES
from .engines.torch_eager import TorchEager

__all__ = ["profile_engine"]

_CALLS = 5


def profile_engine(name: str, model: nn.Module, x: Tensor) -> list[tuple[str, float]]:
    """(layer or operation, seconds of one call), longest first. x: (batch, channels, height, width)."""
    engine = ENGINES[name]
    own = getattr(engine, "profile", None)
    if own is not None:
        found = own(model, x)
    elif isinstance(engine, TorchEager):
        found = _layers(model, x, engine.channels_last)
    else:
        found = _operations(engine.prepare(model, x), x)
    return sorted(found, key=lambda part: -part[1])


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
