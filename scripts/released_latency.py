"""Time ResNet-56 g=4 as released against fused, in one process: ``python scripts/released_latency.py``.

Released: per branch take_along_dim, conv, BN, ReLU; cat and index_add_; torch.jit.trace, inference_mode.
Rounds in random order, 2 threads, medians. Needs ../shared.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from pathlib import Path

import torch
from dsp_benchmarks.subjects.released_form import ReleasedNetwork

import dsp_kernels
from dsp_pruning.released.arrays import build_released, read_released_arrays

SHARED = Path(os.environ.get("DSP_SHARED") or Path(__file__).resolve().parents[2] / "shared")
ROUNDS = 15


def main() -> None:
    """Print milliseconds per call and how many times faster than the released form."""
    torch.set_num_threads(2)
    arrays, meta = read_released_arrays(SHARED / "nets" / "resnet56_g4.npz")
    released, packed = ReleasedNetwork(arrays, meta).eval(), build_released(arrays, meta)
    shuffle = random.Random(0).shuffle
    for batch in (32, 128):
        x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            calls = {"released": torch.jit.trace(released, x)}
            for backend in ("eager", "cpu"):
                calls[f"fused, {backend}"] = dsp_kernels.fuse(packed, x, backend=backend)
            expected = calls["released"](x)
            seconds: dict[str, list[float]] = {name: [] for name in calls}
            for name, call in calls.items():
                assert (call(x) - expected).abs().max() <= 1e-4, name
                call(x)
            for _ in range(ROUNDS):
                order = list(calls)
                shuffle(order)
                for name in order:
                    calls[name](x)
                    started = time.perf_counter()
                    calls[name](x)
                    seconds[name].append(time.perf_counter() - started)
        median = {name: statistics.median(values) for name, values in seconds.items()}
        for name, value in median.items():
            print(f"batch {batch:<4} {name:<14} {1e3 * value:8.2f} ms  {median['released'] / value:6.2f} x")


if __name__ == "__main__":
    main()
