"""``dsp calibrate``: measures this machine, so that the time of layers can be predicted."""

import os
from contextlib import suppress
from dataclasses import replace
from enum import StrEnum
from typing import Annotated

import torch
import typer

from dsp_cli.show import console, progress_bars
from dsp_kernels.errors import DSPFormatError
from dsp_kernels.times.calibrate import calibrate as measure
from dsp_kernels.times.model import LayerTimes

Dtype = StrEnum("Dtype", "float32 bfloat16")


def calibrate(
    threads: Annotated[
        list[int] | None,
        typer.Option("--threads", min=1, help="Threads of a call; repeatable. Default: 1, and all cores."),
    ] = None,
    dtype: Annotated[Dtype, typer.Option("--dtype", help="What convolutions multiply.")] = Dtype("float32"),
    seconds: Annotated[float, typer.Option("--seconds", min=1, max=60, help="How long to measure.")] = 45.0,
) -> None:
    """Measure how long the native kernels take on this machine, for --target time and explain().

    Let nothing else run meanwhile. Ctrl-C leaves an earlier measurement as it was.
    """
    counts = threads or sorted({1, os.cpu_count() or 1})
    with progress_bars() as bars:
        times = measure(counts, getattr(torch, dtype), seconds, bars("calibrate"))
    with suppress(FileNotFoundError, DSPFormatError):  # what was measured for other settings stays
        times = replace(times, weights={**LayerTimes.load().weights, **times.weights})
    console.print(f"times: {times.save()}", soft_wrap=True)
