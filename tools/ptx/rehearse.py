"""Runs a Python program as on a machine with a GPU, with the interpreter in its place.

    PYTHONPATH=tools python -m ptx.rehearse -m dsp_cli.main doctor

torch says that there is an H200. What is moved there stays in host memory; every launch of a CUDA kernel is
interpreted and checked, and Triton's kernel runs in Triton's interpreter. Networks get images of 4x4 pixels
and batches of 8 at most, because both are slow. Not rehearsed: streams, CUDA graphs (a replay launches
again), cuDNN, a second device, memory of a GPU, and times, which mean nothing.
"""

import math
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import dsp_benchmarks.run
import torch
from dsp_benchmarks.engines import ENGINES, cuda_graph
from dsp_benchmarks.engines.fused import Fused
from dsp_benchmarks.measure.timing import TimingRules
from dsp_benchmarks.subjects import networks
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from dsp_kernels.run.eager.program import EagerExecutor
from dsp_kernels.run.gpu import tune
from dsp_kernels.run.gpu.cuda import conv, library
from dsp_kernels.run.gpu.cuda.blocks import conv as block_conv
from dsp_kernels.run.gpu.cuda.blocks.plan import H200
from dsp_kernels.run.gpu.cuda.launch import launch_op
from dsp_kernels.run.gpu.program import CudaExecutor, GpuRunner
from ptx.build import LIBRARY, build
from ptx.interpreter import Interpreter

GPU = torch.device("cuda", 0)
# Of torch.cuda.
ANSWERS: dict[str, Any] = {
    "is_available": True,
    "device_count": 1,
    "current_device": 0,
    "get_device_name": "an interpreter as H200",
    "get_device_capability": (9, 0),
    "get_device_properties": SimpleNamespace(
        multi_processor_count=H200.multiprocessors,
        shared_memory_per_block_optin=H200.shared_per_block,
        shared_memory_per_multiprocessor=H200.shared_per_multiprocessor,
    ),
    "synchronize": None,
    "empty_cache": None,
}
MOST_IMAGES, SIDE = 8, 4


class OnHost(TorchFunctionMode):
    """Every function of torch that is told a GPU takes the CPU instead."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.cuda:
            return args[0]
        if func is torch.device:  # only named, nothing is there yet
            return func(*args, **(kwargs or {}))

        def host(value: Any) -> Any:
            is_gpu = isinstance(value, str | torch.device) and str(value).startswith("cuda")
            return torch.device("cpu") if is_gpu else value

        args, kwargs = tree_map(host, (args, kwargs or {}))
        return func(*args, **kwargs)


def on_gpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, told that every device is the GPU."""
    return lambda *arguments: function(
        *(GPU if isinstance(each, torch.device) else each for each in arguments)
    )


_launches: list[str] = []  # the kernels that ran


def interpreted(*arguments: Any) -> None:
    """launch_op on tensors in host memory."""
    with Interpreter("sm_90a") as ptx:
        launch_op(*arguments)
    _launches.extend(ptx.launches)


def replayed(launch: Callable[[], None], device: torch.device, pool: object) -> Callable[[], None]:
    """Stands for run.gpu.graphs.capture."""
    launch()
    return launch


def pretended_seconds(device: torch.device, launch: Callable[[], None]) -> float:
    """CUDA kernels are faster than all else, and few of them faster than many."""
    before = len(_launches)
    launch()
    return len(_launches) - before or math.inf


def small_run(network: Any, batches: Sequence[int], cases: Any, rules: TimingRules, **settings: Any) -> Any:
    """run_cases with at most MOST_IMAGES, each engine twice."""
    rules = replace(rules, rounds=2, warmup=0.0, warm_calls=0, settle=0.0, burst=0.0)
    return _run_cases(network, sorted({min(n, MOST_IMAGES) for n in batches}), cases, rules, **settings)


def small_network(source: networks.NetworkSource) -> networks.Network:
    """load_network for images of SIDE x SIDE."""
    return _load_network(replace(source, image_size=SIDE))


# Engines whose device is the host's here.
_MOVED = cuda_graph.CudaGraph, cuda_graph.CudnnFused, Fused
_run_cases, _load_network = dsp_benchmarks.run.run_cases, networks.load_network


@contextmanager
def rehearsal() -> Iterator[None]:
    """Inside, this thread has a GPU."""
    patches = [
        *(
            mock.patch.object(torch.cuda, name, lambda *a, value=value: value)
            for name, value in ANSWERS.items()
        ),
        mock.patch.object(library, "LIBRARY", build() / LIBRARY),
        *(mock.patch.object(module, "launch_op", interpreted) for module in (conv, block_conv)),
        *(
            mock.patch.object(where, name, on_gpu(getattr(where, name)))
            for where, name in (
                (conv, "why_no_cuda_on"),
                (conv, "has_wgmma"),
                (block_conv, "why_no_cuda_on"),
                (CudaExecutor, "can_run"),
            )
        ),
        mock.patch.object(tune, "gpu_seconds", pretended_seconds),
        mock.patch.object(GpuRunner.__init__, "__defaults__", ("auto", on_gpu(tune.tuner_for))),
        mock.patch.object(cuda_graph, "capture", replayed),
        mock.patch.object(cuda_graph.CudnnConvs, "call", EagerExecutor.call),
        mock.patch.dict(
            ENGINES,
            {name: replace(each, device="any") for name, each in ENGINES.items() if isinstance(each, _MOVED)},
        ),
        mock.patch.object(dsp_benchmarks.run, "run_cases", small_run),
        mock.patch.object(networks, "load_network", small_network),
    ]
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict("os.environ", {"DSP_KERNELS_CACHE": cache}))
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(OnHost())
        yield


def main() -> None:
    """Runs the arguments as python does: -m MODULE or FILE, and its arguments."""
    _, *sys.argv = sys.argv
    run: Callable[..., Any] = runpy.run_path
    if sys.argv[0] == "-m":
        run = runpy.run_module
        _, *sys.argv = sys.argv
    else:
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
    with rehearsal():
        try:
            run(sys.argv[0], run_name="__main__")
        finally:
            print(f"{len(_launches)} launches interpreted, {len(set(_launches))} kernels", file=sys.stderr)


if __name__ == "__main__":
    main()
