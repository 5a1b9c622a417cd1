"""The steps of a fused network on the CPU: their measured time beside the predicted one."""

from collections import defaultdict

import numpy as np
import torch

from dsp_kernels.errors import DSPBackendError, DSPFormatError
from dsp_kernels.program.steps import Program
from dsp_kernels.run.cpu.program import dtype_of, native_networks
from dsp_kernels.times.calibrate import measure
from dsp_kernels.times.model import LayerTimes, blocks_of, by_value, calls_of


def clocked_steps(program: Program) -> dict[str, str]:
    """Output of a step -> its microseconds for the example's batch, as text; predicted ones if there are."""
    batch, threads = program.shapes[program.inputs[0]][0], torch.get_num_threads()
    measured = measured_steps(program, batch, threads)
    try:
        # Integers were not measured.
        predicted = {} if program.is_integer else LayerTimes.load().program(program, batch, threads)
    except (FileNotFoundError, DSPFormatError, DSPBackendError):
        predicted = {}
    return {
        name: f"{time:.1f} us" + (f", predicted {predicted[name]:.1f}" if name in predicted else "")
        for name, time in measured.items()
    }


def measured_steps(program: Program, batch: int, threads: int) -> dict[str, float]:
    """Output of a native step -> microseconds in one call; a step that is only a view has none."""
    found: defaultdict[str, float] = defaultdict(float)
    for network, shapes, names in native_networks(program, dtype_of(program)):
        for launch, times in zip(*measure(network, shapes, batch, threads), strict=True):
            own = np.array(times) / blocks_of(launch) * calls_of(launch, threads)
            for name, time in by_value(launch, own, names).items():
                found[name] += time
    return dict(found)
