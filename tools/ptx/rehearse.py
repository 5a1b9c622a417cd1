"""Runs a Python program as on a machine with a GPU, with the interpreter in its place.

    PYTHONPATH=tools python -m ptx.rehearse -m dsp_cli.main doctor

torch says that there is an H200, and of what is moved or made there that it is on it (pretended.py); an
operation on tensors of both devices raises an error. Every launch of a CUDA kernel is interpreted and
checked, and Triton's kernel runs in Triton's interpreter. Networks get images of 4x4 pixels and batches
of 8 at most, because both are slow. Not rehearsed: streams, CUDA graphs (a replay launches again), cuDNN,
a second device, other threads than the first, memory of a GPU, and times, which mean nothing.
"""

import math
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import dsp_benchmarks.run
import torch
from dsp_benchmarks.engines import cuda_graph
from dsp_benchmarks.measure import peaks
from dsp_benchmarks.measure.timing import TimingRules
from dsp_benchmarks.subjects import networks

from dsp_kernels.run.eager.program import EagerExecutor
from dsp_kernels.run.gpu import program, tune
from dsp_kernels.run.gpu.cuda import conv, library
from dsp_kernels.run.gpu.cuda.blocks import conv as block_conv
from dsp_kernels.run.gpu.cuda.launch import launch_op
from dsp_kernels.run.gpu.triton import conv as triton_conv
from ptx.build import LIBRARY, build
from ptx.interpreter import Interpreter
from ptx.pretended import pretended_gpu

MOST_IMAGES, SIDE = 8, 4
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


def small_matmul_rate(size: int, *settings: Any) -> float:
    """_matmul_rate of a size that a CPU multiplies at once."""
    return _matmul_rate(64, *settings)


def small_network(source: networks.NetworkSource) -> networks.Network:
    """load_network for images of SIDE x SIDE, with labels, so that answers are counted."""
    network = _load_network(replace(source, image_size=SIDE))
    network.labelled = networks.Labelled(network.images(MOST_IMAGES + 1, 0), torch.arange(MOST_IMAGES + 1))
    return network


_run_cases, _load_network = dsp_benchmarks.run.run_cases, networks.load_network
_matmul_rate, _device_times = peaks._matmul_rate, dsp_benchmarks.run.device_times


@contextmanager
def rehearsal() -> Iterator[None]:
    """Inside, this thread has a GPU."""
    patches = [
        mock.patch.object(library, "LIBRARY", build() / LIBRARY),
        *(mock.patch.object(module, "launch_op", interpreted) for module in (conv, block_conv)),
        *(mock.patch.object(module, "capture", replayed) for module in (program, cuda_graph)),
        mock.patch.object(triton_conv, "_kernel", return_value=triton_conv._kernel(True)),
        mock.patch.object(tune, "gpu_seconds", pretended_seconds),
        mock.patch.object(cuda_graph.CudnnConvs, "call", EagerExecutor.call),
        mock.patch.object(dsp_benchmarks.run, "run_cases", small_run),
        mock.patch.object(dsp_benchmarks.run, "device_times", partial(_device_times, repeats=1)),
        mock.patch.object(networks, "load_network", small_network),
        mock.patch.object(peaks, "_matmul_rate", small_matmul_rate),
    ]
    with ExitStack() as stack:
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(mock.patch.dict("os.environ", {"DSP_KERNELS_CACHE": cache}))
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(pretended_gpu())
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
