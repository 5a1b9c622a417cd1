"""Correct first: what an engine gives is compared before it may be timed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dsp_kernels.program.steps import ConvStep, LinearStep, Program
from dsp_kernels.tolerances import network_tolerance

from .engines import Runner

__all__ = ["Checked", "allowed_difference", "check"]


@dataclass(frozen=True)
class Checked:
    """difference: the largest from the reference; error: why the answer is wrong, empty where it is right."""

    difference: float
    error: str = ""


def allowed_difference(program: Program, dtype: torch.dtype, expected: Tensor) -> float:
    """How far rounding in ``dtype`` may move an output: the bound of ``dsp_kernels.tolerances``, absolute.

    program: of the network; expected: its reference output, whose largest value the bound is relative to.
    """
    convs = [step for step in program.steps if isinstance(step, ConvStep)]
    linears = [step for step in program.steps if isinstance(step, LinearStep)]
    # Not the kernels of a group but of the whole layer: other forms sum over all live channels.
    sizes = [step.spec.structure.in_channels * math.prod(step.spec.kernel_size) for step in convs]
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    depth = len(convs) + len(linears)
    return network_tolerance(dtype, max(sizes, default=1), depth) * max(scale, torch.finfo(dtype).tiny)


def check(name: str, run: Runner, x: Tensor, expected: Tensor, allowed: float) -> Checked:
    """Compare what ``run`` gives for ``x`` with ``expected``; both outputs have the same shape if right."""
    got = run(x)
    if got.shape != expected.shape:
        shapes = f"{tuple(got.shape)}, it must be {tuple(expected.shape)}"
        return Checked(math.nan, f"engine {name!r} gives shape {shapes}: it is not timed")
    difference = float((got.float() - expected.float()).abs().max()) if got.numel() else 0.0
    if not difference <= allowed:
        return Checked(
            difference,
            f"engine {name!r} is off by {difference:.3g}, at most {allowed:.3g} is right: it is not timed",
        )
    return Checked(difference)
