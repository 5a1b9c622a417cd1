"""Time every residual block of networks on a GPU as one kernel and per convolution, beside its floor."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from dsp_benchmarks.engines.base import cuda_available
from dsp_benchmarks.measure.gpu_blocks import block_times
from dsp_benchmarks.measure.gpu_layers import write_times
from dsp_benchmarks.measure.peaks import measure_peaks
from dsp_benchmarks.subjects.networks import NetworkSource, load_network

from dsp_kernels.env import describe_environment


def main() -> None:
    """Write one JSON file and print one line per block and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", nargs="+", default=["resnet20_g4", "resnet18_g2_80", "resnet50_g2_80"])
    parser.add_argument("--batch", nargs="+", type=int, default=[32, 256], help="multiples of 8")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    able, reason = cuda_available()
    if not able:
        raise SystemExit(f"block times need a GPU: {reason}")
    dtype = getattr(torch, options.dtype)
    peaks = measure_peaks("cuda", (dtype,))
    found = []
    for name in options.net:
        program = load_network(NetworkSource(name)).program("packed")
        for batch in options.batch:
            for time in block_times(program, batch, dtype, peaks):
                found.append(time)
                print(
                    f"{name}, batch {batch}, {time.block}, {time.what}{', chosen' if time.chosen else ''}: "
                    f"{1e6 * time.seconds:.1f} us (predicted {1e6 * time.predicted:.1f}), per convolution "
                    f"{1e6 * time.per_conv:.1f}, floor {1e6 * time.floor:.1f}, fraction {time.fraction:.2f}",
                    flush=True,
                )
            write_times(options.out, "blocks", found, describe_environment())


if __name__ == "__main__":
    main()
