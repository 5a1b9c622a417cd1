"""The steps of a fused network on the CPU: their measured time beside the predicted one."""

from collections import defaultdict

import numpy as np
import torch

from dsp_kernels.errors import DSPBackendError, DSPFormatError
from dsp_kernels.program.steps import Program
from dsp_kernels.run.cpu.program import build, dtype_of, segments
from dsp_kernels.times.calibrate import measure
from dsp_kernels.times.model import LayerTimes, by_value, calls_of


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
    for part in (part for part in segments(program) if part.native):
        network, values = build(part, program, dtype_of(program))
        names = {value: name for name, value in values.items()}
        shapes = [(*program.shapes[name][1:], 1, 1)[:3] for name in part.inputs]
        for launch, times in zip(*measure(network, shapes, batch, threads), strict=True):
            blocks = launch["images"] if launch["together"] else -(-launch["images"] // launch["interleave"])
            for name, time in by_value(
                launch, np.array(times) / blocks * calls_of(launch, threads), names
            ).items():
                found[name] += time
    return dict(found)
