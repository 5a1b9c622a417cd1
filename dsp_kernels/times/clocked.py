"""The steps of a fused network on the CPU: their measured time beside the predicted one."""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch

from dsp_kernels.errors import DSPBackendError, DSPFormatError
from dsp_kernels.program.steps import Program
from dsp_kernels.run.cpu.program import dtype_of, native_networks
from dsp_kernels.times.calibrate import measure
from dsp_kernels.times.model import LayerTimes, Matrix, blocks_of, calls_of

Steps = defaultdict[str, float]  # output of a native step -> microseconds in one call


def explained_steps(program: Program) -> dict[str, str]:
    """Output of a step -> its microseconds for the example's batch, as text; predicted ones if there are."""
    times = None
    with suppress(FileNotFoundError, DSPFormatError):
        times = LayerTimes.load()
    batch, threads = program.shapes[program.inputs[0]][0], torch.get_num_threads()
    measured, predicted = clocked_steps(program, batch, threads, times)
    return {
        name: f"{time:.1f} us" + (f", predicted {predicted[name]:.1f}" if name in predicted else "")
        for name, time in measured.items()
    }


def clocked_steps(
    program: Program, batch: int, threads: int, times: LayerTimes | None
) -> tuple[Steps, Steps]:
    """What native steps take, measured now, and predicted from ``times`` as far as those are measured."""
    measured: Steps = defaultdict(float)
    predicted: Steps = defaultdict(float)
    dtype = dtype_of(program)
    for network, shapes, names in native_networks(program, dtype):
        for launch, took in zip(*measure(network, shapes, batch, threads), strict=True):
            own = np.array(took) / blocks_of(launch) * calls_of(launch, threads)
            _add(measured, launch, own, names)
            if times is not None and not program.is_integer:  # integers were not measured
                with suppress(DSPBackendError):
                    _add(predicted, launch, times.operations(launch, threads, dtype), names)
    return measured, predicted


def _add(found: Steps, launch: Mapping[str, Any], times: Matrix, names: Mapping[int, str]) -> None:
    """Add the times of operations to the values that they compute; a split belongs to what reads it."""
    waiting = 0.0
    for (made, kernel), time in zip(launch["operations"], times, strict=True):
        waiting += float(time)
        if made >= 0 or kernel == "store":
            found[names.get(made, "store")] += waiting
            waiting = 0.0
