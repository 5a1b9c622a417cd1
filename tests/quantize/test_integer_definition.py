"""The arithmetic of integer networks against an independent one in numpy: int64 sums, float32 ends."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from cases import CASES, Case
from torch import Tensor

from dsp_kernels import GroupStructure
from dsp_kernels.program.steps import (
    ConvStep,
    ElementwiseStep,
    GlobalPoolStep,
    LinearStep,
    PoolStep,
    QuantizeStep,
    Requantize,
    Step,
)
from dsp_kernels.run.eager.program import EagerExecutor

Array = np.ndarray[Any, Any]
# What a layer reads and writes: levels of the input, limits of the output (None: a float), exact.
KINDS: dict[str, tuple[tuple[int, int], tuple[int, int] | None, bool]] = {
    "u8 to u8": ((0, 255), (0, 255), False),
    "s8 to s8": ((-128, 127), (-128, 127), False),
    "u8 to ReLU6": ((0, 255), (0, 93), False),
    "s8 to float": ((-128, 127), None, False),
    "u8 to float": ((0, 255), None, False),
    "exact to u8": ((-1500, 1500), (0, 255), True),
}


# Sums beyond 2^24, which float32 rounds.
LONG = (Case("long sums", GroupStructure.dense(190, 5), hw=(5, 4), residual=True),)


def integers(rng: np.random.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.from_numpy(rng.integers(low, high + 1, shape).astype(np.float32))


def run(step: Step, **values: Tensor) -> Array:
    return EagerExecutor().call(step)(dict(values)).numpy()


def ended(t: Array, limits: tuple[int, int] | None, activation: str = "none") -> Array:
    assert t.dtype == np.float32
    if limits is None:
        return np.clip(t, *{"none": (-np.inf, np.inf), "relu": (0, np.inf), "relu6": (0, 6)}[activation])
    return np.rint(np.clip(t, *np.float32(limits)))


def requantized(multiplier: Tensor, kind: str, residual: float | None = None) -> Requantize:
    levels, limits, exact = KINDS[kind]
    low, high = limits or (-math.inf, math.inf)
    return Requantize(multiplier, residual, low, high, exact, levels[0] < 0)


def convolved(case: Case, x: Array, weights: list[Array]) -> Array:
    """The sums in int64."""
    spec = case.spec
    (ph, pw), (sh, sw), (dh, dw), (kh, kw) = spec.padding, spec.stride, spec.dilation, spec.kernel_size
    padded = np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    window = dh * (kh - 1) + 1, dw * (kw - 1) + 1
    seen = np.lib.stride_tricks.sliding_window_view(padded, window, (2, 3))[:, :, ::sh, ::sw, ::dh, ::dw]
    sums = np.zeros((len(x), spec.structure.out_channels, *seen.shape[2:4]), np.int64)
    for group, weight in zip(spec.structure.groups, weights, strict=True):
        sums[:, list(group.out_index)] = np.einsum("nchwij,ocij->nohw", seen[:, list(group.in_index)], weight)
    return sums


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [c for c in (*CASES, *LONG) if c.spec.activation in ("none", "relu", "relu6")],
    ids=lambda case: case.name,
)
def test_a_convolution(case: Case, kind: str) -> None:
    rng = np.random.default_rng([case.seed, *map(ord, kind)])
    levels, limits, _ = KINDS[kind]
    structure, given = case.structure, case.tensors()
    x = integers(rng, *levels, *given.x.shape)
    least = 30 if case in LONG else -127
    weights = [integers(rng, least, 127, *weight.shape) for weight in given.weights]
    typical = 3e-6 if case in LONG else 1e-3
    multiplier = torch.from_numpy(rng.uniform(0.1, 3, structure.out_channels).astype(np.float32)) * typical
    bias = None if given.bias is None else given.bias * 40
    if bias is not None:
        bias[list(structure.absent)] = 0
    residual, factor = None, float(np.float32(rng.uniform(0.3, 1.7)))
    inputs = ("x",)
    if given.residual is not None:
        residual, inputs = integers(rng, -128, 127, *given.residual.shape), ("x", "r")
    activation = case.spec.activation if limits is None else "none"
    step = ConvStep(
        "y",
        inputs,
        case.spec.with_activation(activation),
        tuple(weights),
        bias,
        requantize=requantized(multiplier, kind, factor if given.residual is not None else None),
    )
    got = run(step, x=x, **({} if residual is None else {"r": residual}))
    sums = convolved(case, x.numpy().astype(np.int64), [w.numpy().astype(np.int64) for w in weights])
    t = sums.astype(np.float32) * multiplier.numpy()[:, None, None]
    if bias is not None:
        t = t + bias.numpy()[:, None, None]
    if residual is not None:
        t = t + residual.numpy() * np.float32(factor)
    np.testing.assert_array_equal(got, ended(t, limits, activation))


SETTINGS = {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 0), "ceil_mode": False}


def other_steps(kind: str, rng: np.random.Generator) -> Mapping[str, tuple[Step, Array]]:
    """Name -> the step and its output by numpy, of the values that ``values`` makes."""
    levels = KINDS[kind][0]
    x, y = (integers(rng, *levels, 3, 5, 9, 7).numpy() for _ in range(2))
    m, k = np.float32(0.0071), np.float32(0.41)
    one = requantized(torch.tensor([m]), kind, float(k))
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0))), (3, 2), (2, 3)
    )[:, :, ::2].sum((4, 5), dtype=np.float64)
    whole = x.sum((2, 3), dtype=np.float64).astype(np.float32) * (m / np.float32(63))
    weight, bias = integers(rng, -127, 127, 6, 315), torch.from_numpy(rng.normal(0, 9, 6).astype(np.float32))
    flat = (x.reshape(3, -1).astype(np.int64) @ weight.numpy().astype(np.int64).T).astype(np.float32)
    real = np.rint(rng.normal(0, 80, (2, 30, 4))).astype(np.float32)  # half of them are in the middle of two
    tie = requantized(torch.tensor([2.0**-7]), kind)
    return {
        "values": (Step("", ()), np.stack([x, y])),
        "real": (QuantizeStep("z", ("real",), 0.5, *map(float, levels)), real),
        "add": (ElementwiseStep("z", ("x", "y"), "add", requantize=one), x * m + y * k),
        "multiply": (ElementwiseStep("z", ("x", "y"), "multiply", requantize=tie), x * y / 128),
        "windows": (
            PoolStep("z", ("x",), "avg_pool", SETTINGS, one),
            windows.astype(np.float32) * (m / np.float32(6)),
        ),
        "map": (GlobalPoolStep("z", ("x",), True, one), whole[:, :, None, None]),
        "vector": (GlobalPoolStep("z", ("x",), False, one), whole),
        "linear": (
            LinearStep("z", ("flat",), weight, bias, requantize=one),
            flat * m + bias.numpy(),
        ),
    }


@pytest.mark.parametrize("kind", ["u8 to u8", "s8 to s8", "s8 to float"])
@pytest.mark.parametrize("name", ["add", "multiply", "windows", "map", "vector", "linear"])
def test_another_step(name: str, kind: str) -> None:
    steps = other_steps(kind, np.random.default_rng(7))
    x, y = map(torch.from_numpy, steps["values"][1])
    step, expected = steps[name]
    got = run(step, x=x, y=y, flat=x.flatten(1))
    np.testing.assert_array_equal(got, ended(expected, KINDS[kind][1]))


@pytest.mark.parametrize("kind", ["u8 to u8", "s8 to s8", "exact to u8"])
def test_floats_become_integers(kind: str) -> None:
    step, real = other_steps(kind, np.random.default_rng(3))["real"]
    expected = np.clip(np.rint(real * np.float32(0.5)), *KINDS[kind][0])
    np.testing.assert_array_equal(run(step, real=torch.from_numpy(real)), expected)
