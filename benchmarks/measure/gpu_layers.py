"""Per convolution of a network on a GPU: time, floor and the fraction of the floor that was reached.

One launch at a time, replayed from a CUDA graph; the values rotate among copies larger together than the L2
cache, as in a network where every layer reads what another wrote long ago.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

import dsp_kernels.run.convs  # noqa: F401  (registers the kernels)
from dsp_kernels.errors import DSPBackendError
from dsp_kernels.program.steps import ConvStep, Program
from dsp_kernels.run.gpu.layout import GPU_KERNELS, GpuConv, GpuLayout, layout_for_batch
from dsp_kernels.whole_file import write_text

from .peaks import Peaks

__all__ = ["LayerTime", "layer_times", "replayed_seconds", "value_sets", "write_times"]

_CACHE_BYTES = 128 << 20  # twice the L2 cache of an H200
_MOST_COPIES = 32
_LAUNCHES = 20  # of one layer in one graph
_REPLAYS = 50


@dataclass(frozen=True)
class LayerTime:
    """One convolution. seconds: median of many replays, of one launch; floor: max of bytes and FLOPs."""

    layer: str
    what: str
    kernels: str
    layout: str
    batch: int
    seconds: float
    floor: float
    bytes: int
    flops: int

    @property
    def fraction(self) -> float:
        """Of the floor; 1 cannot be beaten."""
        return self.floor / self.seconds


def layer_times(
    program: Program, batch: int, dtype: torch.dtype, peaks: Peaks, kernels: str = "auto"
) -> Iterator[LayerTime]:
    """Times every different convolution of a Program whose tensors are on a GPU, in ``dtype``.

    Raises DSPBackendError without a GPU.
    """
    if not torch.cuda.is_available():
        raise DSPBackendError("layer times need a CUDA device, and torch finds none")
    device = torch.device("cuda", torch.cuda.current_device())
    layout = layout_for_batch(batch)
    for step in program.steps:
        if not isinstance(step, ConvStep):
            continue
        family = GPU_KERNELS.choose(kernels, step.spec, dtype, device, layout)
        weights = [weight.to(device, dtype) for weight in step.weights]
        bias = None if step.bias is None else step.bias.to(device, dtype)
        conv = family.prepare(step.spec, weights, bias, layout)
        shapes = [(batch, *program.shapes[name][1:]) for name in (*step.inputs, step.output)]
        sets = value_sets(shapes, layout, dtype, device)
        moved, flops = cost(step, shapes, dtype)
        peak = peaks.flops[str(dtype).removeprefix("torch.")]
        floor = max(moved / peaks.bandwidth, flops / peak)
        yield LayerTime(
            step.output,
            step.describe(),
            family.name,
            layout.name,
            batch,
            replayed_seconds(conv, sets, len(step.inputs) == 2),
            floor,
            moved,
            flops,
        )


def cost(step: ConvStep, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> tuple[int, int]:
    """Bytes that one launch has to move at least and floating point operations that it has to do.

    shapes: of x, of the residual if there is one, of the output. Channels that no group reads need not be.
    """
    structure = step.spec.structure
    x, *others = shapes
    numbers = x[0] * len(structure.read) * x[2] * x[3]
    numbers += sum(torch.Size(shape).numel() for shape in others)
    numbers += sum(weight.numel() for weight in step.weights)
    batch, _, height, width = shapes[-1]
    flops = 2 * batch * structure.macs(step.spec.kernel_size, (height, width))
    return numbers * dtype.itemsize, flops


class FloorTime(Protocol):
    """A dataclass of one time beside its floor."""

    @property
    def fraction(self) -> float:
        """Of the floor."""
        ...


def write_times(path: Path, what: str, times: Sequence[FloorTime], environment: dict[str, str]) -> None:
    """JSON: the environment and, as ``what``, one object per time with its fraction of the floor."""
    rows = [{**asdict(time), "fraction": time.fraction} for time in times]  # type: ignore[call-overload]
    write_text(path, json.dumps({"environment": environment, what: rows}, indent=1) + "\n")


def value_sets(
    shapes: Sequence[tuple[int, ...]], layout: GpuLayout, dtype: torch.dtype, device: torch.device
) -> list[list[Tensor]]:
    """Random values of these shapes, in as many copies as do not fit into the L2 cache together."""
    size = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
    copies = max(2, min(_MOST_COPIES, -(-_CACHE_BYTES // size)))
    return [
        [torch.randn(layout.shape(shape), device=device).to(dtype) for shape in shapes] for _ in range(copies)
    ]


def replayed_seconds(conv: GpuConv, sets: Sequence[Sequence[Tensor]], residual: bool) -> float:
    """Of one launch: median of many replays of a graph of launches. sets: x, maybe the residual, out."""

    def launch_all() -> None:
        for number in range(_LAUNCHES):
            values = sets[number % len(sets)]
            conv(values[0], values[-1], values[1] if residual else None)

    replay = _captured(launch_all)
    taken = []
    for _ in range(_REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        taken.append(1e-3 * start.elapsed_time(end) / _LAUNCHES)
    return statistics.median(taken)


def _captured(launch_all: Callable[[], None]) -> Callable[[], None]:
    from dsp_kernels.run.gpu.graphs import capture

    replay = capture(launch_all, torch.device("cuda", torch.cuda.current_device()), None)
    if replay is None:
        raise DSPBackendError("this convolution cannot be captured in a CUDA graph")
    replay()
    return replay
