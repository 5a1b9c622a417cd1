"""The grid of every value, from what it holds for some images."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsp_kernels.errors import DSPError, DSPShapeError
from dsp_kernels.graph.inputs import Example, as_inputs
from dsp_kernels.program.steps import Program
from dsp_kernels.quantizing.choose import Choice
from dsp_kernels.quantizing.rewrite import Grid
from dsp_kernels.run.eager.program import EagerExecutor

MOST_IMAGES = 256
SCALES = 1e-12, 1e12  # the least and the largest
METHODS = ("mse", "minmax")
_SAMPLES = 2**17  # numbers of one value whose errors are summed
_MOST_ELEMENTS = 2**25  # of all values of one batch


def calibration_inputs(images: Tensor | Iterable[Example]) -> tuple[Tensor, ...]:
    """The inputs of the first MOST_IMAGES images, float32 on the CPU. Raises DSPShapeError for none."""
    batches: list[tuple[Tensor, ...]] = []
    count = 0
    for batch in (images,) if isinstance(images, Tensor) else images:
        inputs = as_inputs(batch)
        batches.append(tuple(x[: MOST_IMAGES - count].detach().cpu().float() for x in inputs))
        count += len(batches[-1][0])
        if count == MOST_IMAGES:
            break
    if not batches:
        raise DSPShapeError("there are no calibration images")
    if len({tuple(x.shape[1:] for x in inputs) for inputs in batches}) > 1:
        raise DSPShapeError("the calibration images have several sizes; expected one")
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def find_grids(choice: Choice, inputs: Sequence[Tensor], method: str) -> dict[str, Grid]:
    """The grid of every value in ``choice.scaled``. Raises DSPError where one is not finite."""
    found = _Ranges(choice.program, list(choice.scaled), len(inputs[0]))
    found.run(inputs)
    grids: dict[str, Grid] = {}
    for root in dict.fromkeys(choice.scaled.values()):
        names = [name for name, first in choice.scaled.items() if first == root]
        low, high = (pick(found.ranges[name][side] for name in names) for side, pick in enumerate((min, max)))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DSPError(f"{root} is not finite for the calibration images")
        samples = torch.cat([part for name in names for part in found.samples[name]])
        grids |= dict.fromkeys(names, _grid(samples, low, high, method, choice.limits.get(root)))
    return grids


class _Ranges:
    """Smallest and largest number and a sample of each of these values."""

    def __init__(self, program: Program, names: list[str], images: int) -> None:
        made = (*program.inputs, *(step.output for step in program.steps))
        self._program = replace(program, outputs=tuple(name for name in made if name in names))
        self._quota = max(1, _SAMPLES // images)  # of one image
        self.ranges = dict.fromkeys(names, (math.inf, -math.inf))
        self.samples: Mapping[str, list[Tensor]] = {name: [] for name in names}

    def run(self, inputs: Sequence[Tensor]) -> None:
        run = EagerExecutor().prepare(self._program)
        elements = sum(math.prod(shape[1:]) for shape in self._program.shapes.values())
        batch = max(1, min(32, _MOST_ELEMENTS // max(elements, 1)))
        batches = list(zip(*(x.split(batch) for x in inputs), strict=True))
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for parts in _with_bar(batches):
                for name, value in zip(self._program.outputs, run(parts), strict=True):
                    self._note(name, value)

    def _note(self, name: str, value: Tensor) -> None:
        if not value.numel():
            return
        flat = value.reshape(-1)
        low, high = (float(part) for part in flat.aminmax())
        before = self.ranges[name]
        # min() would drop a NaN.
        bad = math.isnan(low) or math.isnan(high)
        self.ranges[name] = (math.nan, math.nan) if bad else (min(low, before[0]), max(high, before[1]))
        # Multiples of the golden ratio are spread evenly over all channels and pixels.
        count = min(self._quota * len(value), len(flat))
        places = torch.arange(count, dtype=torch.float64) * 0.6180339887498949 % 1
        self.samples[name].append(flat[(places * len(flat)).long()])


def _with_bar(batches: list[Any]) -> Iterable[Any]:
    """With a progress bar on a terminal, if it takes longer than two seconds and tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return batches
    bar: Iterable[Any] = tqdm(batches, "calibrating", delay=2, leave=False, disable=None)
    return bar


def _grid(samples: Tensor, low: float, high: float, method: str, limit: int | None) -> Grid:
    """limit: of a value with more levels than a byte."""
    if limit is not None:
        return Grid(_bounded(max(-low, high) / limit), -limit, limit)
    levels = (0, 255) if low >= 0 else (-128, 127)
    full = max(high / levels[1], low / levels[0] if low < 0 else 0.0)
    if method == "minmax":
        return Grid(_bounded(full), *levels)
    best, least = full, math.inf
    for factor in np.linspace(0.3, 1, 29):
        scale = _bounded(full * float(factor))
        error = float(((samples / scale).round_().clamp_(*levels).mul_(scale) - samples).square_().mean())
        if error < least:
            best, least = scale, error
    return Grid(_bounded(best), *levels)


def _bounded(scale: float) -> float:
    return min(max(scale, SCALES[0]), SCALES[1])
