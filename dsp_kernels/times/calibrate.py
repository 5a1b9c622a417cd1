"""Measures random small networks on this machine and fits the time of what their operations do."""

import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from dsp_kernels.errors import DSPBackendError
from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.run.cpu.conv import add_conv
from dsp_kernels.run.cpu.extension import new_network
from dsp_kernels.times.model import LayerTimes, Matrix, blocks_of, counted, key_of, machine_name

_LONGEST = 0.25  # seconds of one measurement, for small networks a tenth of it
_FEWEST = 7  # calls of one measurement
_LEAST = 40  # measured networks without which nothing is fitted
# An operation of few microseconds is measured less exactly, and matters less.
_SHORT = 2.0
_ROUNDS = 15  # of fitting, each with less weight for what fitted badly in the last


def calibrate(
    threads: Sequence[int],
    dtype: torch.dtype = torch.float32,
    seconds: float = 45.0,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
    seed: int = 0,
) -> LayerTimes:
    """Measure this machine for some numbers of threads.

    seconds: limit; the last network may exceed it. progress: (done, total, text).
    Raises DSPBackendError without the native kernels, or if the time is too short for enough networks.
    """
    machine, rng = machine_name(), random.Random(seed)
    found: dict[str, _Samples] = defaultdict(_Samples)
    begin, networks = time.perf_counter(), 0
    while (spent := time.perf_counter() - begin) < seconds:
        progress(int(spent * 10), int(seconds * 10), f"{networks} networks")
        trial, networks = _Trial(rng, dtype), networks + 1
        for count in threads:
            images = rng.choice((1, 1, 1, 2, 4, 8, 16, 32))
            while images > 2 and trial.macs * images > 1e9:
                images //= 2
            launches, times = measure(trial.network, [trial.shape], images, count)
            for launch, took in zip(launches, times, strict=True):
                if not launch["together"] or launch["images"] == 1:
                    samples = found[key_of(dtype, count, launch)]
                    samples.rows.append(counted(launch, count))
                    samples.times.append(np.array(took) / blocks_of(launch))
    if networks < _LEAST:
        raise DSPBackendError(
            f"{seconds} s were enough for {networks} networks, not for {_LEAST}; give more seconds"
        )
    return LayerTimes(machine, {key: samples.fit() for key, samples in found.items()})


@dataclass
class _Samples:
    """What operations did, and their microseconds."""

    rows: list[Matrix] = field(default_factory=list)
    times: list[Matrix] = field(default_factory=list)

    def fit(self) -> Matrix:
        """Microseconds per unit of each feature: least relative differences, not negative."""
        rows, times = np.concatenate(self.rows), np.concatenate(self.times)
        scale = np.maximum(rows.max(0), 1e-12)
        weight = trust = 1 / np.maximum(times, _SHORT) ** 0.75
        for _ in range(_ROUNDS):
            fitted = nonnegative(rows / scale * weight[:, None], times * weight)
            off = np.abs(rows / scale @ fitted - times) / np.maximum(times, _SHORT)
            weight = trust / np.sqrt(np.maximum(off, 0.03))  # least absolute differences, in the end
        found: Matrix = fitted / scale
        return found


def measure(
    network: Any, shapes: Sequence[tuple[int, ...]], images: int, threads: int
) -> tuple[list[dict[str, Any]], list[list[float]]]:
    """The launches of a native network, and the microseconds of their operations (see ``Network.times``).

    shapes: (channels, height, width) of every input.
    """
    sizes = [shape[1:] for shape in shapes]
    inputs = [torch.rand(images, *shape).numpy() for shape in shapes]
    outputs = [torch.empty(images, *shape).numpy() for shape in network.output_shapes(sizes)]
    network.run(inputs, outputs, threads)
    begin = time.perf_counter()
    network.run(inputs, outputs, threads)
    once = time.perf_counter() - begin
    calls = int(min(max(_LONGEST / 10 / once, _FEWEST), 100))
    calls = max(3, min(calls, int(_LONGEST / once)))
    return network.launches(sizes, images, threads), network.times(inputs, outputs, threads, 0, calls)


class _Trial:
    """A random network of 3 to 10 convolutions: sizes, groups and shortcuts as in pruned networks."""

    def __init__(self, rng: random.Random, dtype: torch.dtype) -> None:
        self.network = new_network(dtype)
        self.macs, self.rng = 0, rng
        most = 10 ** rng.uniform(6.0, 8.3)  # multiply-adds of a convolution
        if stem := rng.random() < 0.15:
            self.hw, channels = rng.choice((64, 112, 160, 224)), 3
        else:
            self.hw = rng.choice((7, 7, 8, 14, 14, 16, 28, 32, 56, 56, 112))
            widest = min(11.0, 20.0 - 2 * math.log2(self.hw))  # a map of 4 MB, or 2048 channels
            channels = round(2 ** rng.uniform(3, widest))
        self.shape = channels, self.hw, self.hw
        x = self.network.input(channels)
        if stem:
            x, channels = self.conv(x, channels, rng.choice((16, 24, 32, 64)), 7, 2, dense=True)
            pool = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "ceil_mode": False}
            x, self.hw = self.network.pool(x, kind="max_pool", **pool), (self.hw + 1) // 2
        for _ in range(rng.choice((3, 4, 6, 10))):
            kernel = 3 if rng.random() < 0.7 else 1
            fits = most / (self.hw * kernel) ** 2 / channels  # filters
            if rng.random() < 0.5 and channels < fits * 1.5:
                inner, between = self.conv(x, channels, max(1, round(channels * rng.uniform(0.5, 1))), kernel)
                x, channels = self.conv(inner, between, channels, kernel, residual=x)
                continue
            wanted = min(fits, channels * 2 ** rng.uniform(-1.2, 1.2), 640)
            stride = 2 if rng.random() < 0.15 and self.hw > 7 else 1
            x, channels = self.conv(
                x, channels, int(max(wanted, 4)), kernel, stride, dense=rng.random() < 0.2
            )
        if rng.random() < 0.4:
            x = self.network.concat([self.network.adaptive(x, (1, 1))])
            weight = np.zeros((rng.choice((10, 1000)), channels), np.float32)
            x = self.network.linear(x, weight, None, "none")
        self.network.output(x)

    def conv(
        self, x: int, c: int, o: int, kernel: int, stride: int = 1, residual: int = -1, dense: bool = False
    ) -> tuple[int, int]:
        """The number of its value, and its channels."""
        structure = GroupStructure.dense(c, o) if dense else self.structure(c, o)
        window, pads = (kernel, kernel), (kernel // 2, kernel // 2)
        spec = ConvSpec(
            structure, window, (stride, stride), pads, activation=self.rng.choice(("relu", "none"))
        )
        weights = [
            torch.randn(len(group.out_index), len(group.in_index), kernel, kernel)
            / (len(group.in_index) * kernel * kernel) ** 0.5
            for group in structure.groups
        ]
        size = spec.output_hw((self.hw, self.hw))
        self.macs, self.hw = self.macs + structure.macs(spec.kernel_size, size), size[0]
        return add_conv(self.network, spec, weights, None, x, residual), o

    def structure(self, c: int, o: int) -> GroupStructure:
        """Random groups, as pruning leaves them: some filters absent, each group with channels of its own."""
        rng = self.rng
        filters = rng.sample(range(o), max(1, round(o * rng.uniform(0.6, 1.0))))
        cuts = sorted(
            rng.sample(range(1, len(filters)), min(rng.choice((0, 0, 1, 1, 2, 3)), len(filters) - 1))
        )
        groups = []
        for first, last in zip([0, *cuts], [*cuts, len(filters)], strict=True):
            reads = max(1, round(c * min(1.0, rng.uniform(0.15, 1.15))))
            groups.append((sorted(rng.sample(range(c), reads)), sorted(filters[first:last])))
        return GroupStructure.build(c, o, groups)


def nonnegative(rows: Matrix, values: Matrix) -> Matrix:
    """The x >= 0 with the least squares of rows @ x - values (Lawson and Hanson, 1974, chapter 23)."""
    squares, products = rows.T @ rows, rows.T @ values
    x = np.zeros(len(products))
    free = np.zeros(len(x), dtype=bool)
    for _ in range(3 * len(x)):
        slope = np.where(free, -np.inf, products - squares @ x)
        if slope.max() <= 1e-9 * np.abs(products).max():
            break
        free[slope.argmax()] = True
        while True:
            solved = np.zeros(len(x))
            solved[free] = np.linalg.lstsq(squares[np.ix_(free, free)], products[free], rcond=None)[0]
            wrong = free & (solved <= 0)
            if not wrong.any():
                break
            step = (x[wrong] / np.maximum(x[wrong] - solved[wrong], 1e-300)).min()
            x = x + step * (solved - x)
            free &= x > 1e-15
        x = solved
    return x
