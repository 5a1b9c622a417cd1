"""The Program of integers that equals a Program of floats but for rounding."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsp_kernels.errors import DSPError
from dsp_kernels.op.dense import index_tensors, live_bias
from dsp_kernels.program import steps
from dsp_kernels.program.steps import Program, Requantize, Step
from dsp_kernels.quantizing.choose import LARGEST_WEIGHT, Choice


class Grid(NamedTuple):
    """The numbers that a value can hold: scale * q for the integers q from low to high."""

    scale: float
    low: int
    high: int


_FLOAT = Grid(1.0, 0, 0)


class Rewriter:
    """Makes the Program. grids: of every value in ``choice.scaled``.

    The integers of a value v are the value "v.q". Raises DSPError where weights, or factors made from the
    scales, are not finite numbers.
    """

    def __init__(self, choice: Choice, grids: Mapping[str, Grid]) -> None:
        self.choice, self.grids, self.limits = choice, grids, choice.limits
        self.steps: list[Step] = []
        self.made = set(choice.program.inputs)
        self.shapes = dict(choice.program.shapes)

    def run(self) -> Program:
        program, chosen = self.choice.program, self.choice.chosen
        for step in program.steps:
            if step.output in chosen:
                inputs = tuple(self._integers(name) for name in step.inputs)
                output = f"{step.output}.q" if step.output in self.grids else step.output
                self._add(replace(self._rewritten(step), inputs=inputs, output=output))
            else:
                self._floats(step.inputs)
                self._add(step)
        self._floats(program.outputs)
        made = (*program.inputs, *(step.output for step in self.steps))
        outputs = tuple(name for name in made if name in program.outputs)
        program = replace(program, steps=tuple(self.steps), outputs=outputs)
        return replace(program, shapes=self.shapes, notes=self.choice.why)

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        self.made.add(step.output)
        name = step.output.removesuffix(".q")
        if name in self.shapes:
            self.shapes[step.output] = self.shapes[name]

    def _integers(self, name: str) -> str:
        made = f"{name}.q"
        if made not in self.made:
            grid = self.grids[name]
            inverse = _float32(name, 1 / grid.scale)
            self._add(steps.QuantizeStep(made, (name,), inverse, float(grid.low), float(grid.high)))
        return made

    def _floats(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.made:
                self._add(steps.DequantizeStep(name, (f"{name}.q",), _float32(name, self.grids[name].scale)))

    def _rewritten(self, step: Step) -> Step:
        """The step with weights and factors for integers; inputs and output are those of the float step."""
        first, last = self.grids[step.inputs[0]], self.grids[step.inputs[-1]]
        out = self.grids.get(step.output, _FLOAT)
        if isinstance(step, steps.ConvStep):
            weights, scales = _weights(step.weights)
            weight_scales = torch.ones(step.spec.structure.out_channels, dtype=torch.float64)
            for rows, scale in zip(index_tensors(step.spec.structure)[1], scales, strict=True):
                weight_scales[rows] = scale
            made = self._requantize(step, first.scale * weight_scales / out.scale, step.spec.activation)
            if len(step.inputs) == 2:
                made = replace(made, residual=_float32(step.output, last.scale / out.scale))
            spec = step.spec if out is _FLOAT else step.spec.with_activation("none")
            bias = _bias(step, live_bias(step.spec.structure, step.bias), out)
            return replace(step, spec=spec, weights=weights, bias=bias, requantize=made)
        if isinstance(step, steps.LinearStep):
            (weight,), (of_filters,) = _weights([step.weight])
            made = self._requantize(step, first.scale * of_filters / out.scale, step.activation)
            activation = step.activation if out is _FLOAT else "none"
            bias = _bias(step, step.bias, out)
            return replace(step, weight=weight, bias=bias, activation=activation, requantize=made)
        if isinstance(step, steps.ElementwiseStep):
            factor = first.scale / out.scale * (last.scale if step.kind == "multiply" else 1)
            made = self._requantize(step, torch.tensor([factor], dtype=torch.float64), step.activation)
            if step.kind == "add":
                made = replace(made, residual=_float32(step.output, last.scale / out.scale))
            return replace(step, activation="none", requantize=made)
        is_average = getattr(step, "kind", "") != "max_pool"
        if is_average and isinstance(step, steps.GlobalPoolStep | steps.PoolStep):
            factors = torch.tensor([first.scale / out.scale], dtype=torch.float64)
            return replace(step, requantize=self._requantize(step, factors, "none"))
        return step

    def _requantize(self, step: Step, factors: Tensor, activation: str) -> Requantize:
        """factors: of the sum, in float64."""
        read = step.inputs[0]
        out, low, high = self.grids.get(step.output), -math.inf, math.inf
        if out is not None:
            low, high = float(out.low), float(out.high)
            if activation != "none":
                low = max(low, 0.0)
            if activation == "relu6":
                high = min(high, float(math.floor(6 / out.scale * (1 + 1e-9))))
        multiplier = _finite(step, factors.float())
        exact = self.choice.scaled[read] in self.limits
        return Requantize(multiplier, None, low, high, exact, self.grids[read].low < 0)


def _float32(name: str, value: float) -> float:
    rounded = float(np.float32(value))
    if not math.isfinite(rounded):
        raise DSPError(f"{name}: the factor {value:g} is too large for float32")
    return rounded


def _bias(step: Step, bias: Tensor | None, out: Grid) -> Tensor | None:
    return None if bias is None else _finite(step, (bias.double() / out.scale).float())


def _finite(step: Step, numbers: Tensor) -> Tensor:
    if not bool(numbers.isfinite().all()):
        path = getattr(step, "path", "")
        where = f"layer {path!r}" if path else step.output
        raise DSPError(f"{where}: weights or scales are too large to quantise, or not finite")
    return numbers


def _weights(weights: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Integers of -127..127 as float32, and the scale of every filter in float64.

    Of 13 scales from 0.7 to 1 of what the largest weight needs, that of the least squared error.
    """
    integers, scales = [torch.empty(0)] * len(weights), [torch.empty(0)] * len(weights)
    for size in {weight[0].numel() for weight in weights}:  # filters of one size together
        places = [place for place, weight in enumerate(weights) if weight[0].numel() == size]
        flat = torch.cat([weights[place].flatten(1) for place in places]).double()
        largest = flat.abs().amax(1) if size else flat.new_zeros(len(flat))
        full = torch.where(largest == 0, 1.0, largest / LARGEST_WEIGHT)
        best, least, chosen = flat, torch.full_like(full, math.inf), full
        for factor in np.linspace(0.7, 1, 13).tolist():
            scale = full * factor
            q = (flat / scale[:, None]).round().clamp(-LARGEST_WEIGHT, LARGEST_WEIGHT)
            error = (q * scale[:, None] - flat).square().sum(1)
            better = error < least
            best = torch.where(better[:, None], q, best)
            chosen, least = torch.where(better, scale, chosen), torch.minimum(error, least)
        counts = [len(weights[place]) for place in places]
        for place, q, scale in zip(places, best.split(counts), chosen.split(counts), strict=True):
            integers[place], scales[place] = q.reshape(weights[place].shape).float(), scale
    return tuple(integers), scales
