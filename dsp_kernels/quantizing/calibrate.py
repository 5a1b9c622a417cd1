"""The grid of every value, from what it holds for some images."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dsp_kernels.errors import DSPError, DSPShapeError
from dsp_kernels.graph.inputs import Example, as_inputs
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
    made = (*choice.program.inputs, *(step.output for step in choice.program.steps))
    program = replace(choice.program, outputs=tuple(name for name in made if name in choice.scaled))
    run = EagerExecutor().prepare(program)
    elements = sum(math.prod(shape[1:]) for shape in program.shapes.values())
    batch = max(1, min(32, _MOST_ELEMENTS // max(elements, 1)))
    # Of all values with one scale, by the name of the first: smallest and largest numbers, and some numbers.
    ends: dict[str, list[Tensor]] = {root: [] for root in choice.scaled.values()}
    samples: dict[str, list[Tensor]] = {root: [] for root in ends}
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for parts in zip(*(x.split(batch) for x in inputs), strict=True):
            for name, value in zip(program.outputs, run(parts), strict=True):
                flat, root = value.reshape(-1), choice.scaled[name]
                ends[root].append(torch.stack(flat.aminmax()))
                # Multiples of the golden ratio are spread evenly over all channels and pixels.
                count = min(_SAMPLES * len(value) // len(inputs[0]) + 1, len(flat))
                places = torch.arange(count, dtype=torch.float64) * 0.6180339887498949 % 1
                samples[root].append(flat[(places * len(flat)).long()])
    grids = {}
    for root, pairs in ends.items():
        low, high = float(torch.stack(pairs)[:, 0].min()), float(torch.stack(pairs)[:, 1].max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise DSPError(f"{root} is not finite for the calibration images")
        grids[root] = _grid(torch.cat(samples[root]), low, high, method, choice.limits.get(root))
    return {name: grids[root] for name, root in choice.scaled.items()}


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
