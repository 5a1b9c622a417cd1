"""Time every convolution of networks on a GPU beside its floor: ``python scripts/gpu_layers.py --help``."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from dsp_benchmarks.engines.base import cuda_available
from dsp_benchmarks.measure.gpu_layers import layer_times, write_times
from dsp_benchmarks.measure.peaks import measure_peaks
from dsp_benchmarks.subjects.networks import NetworkSource, load_network
from tqdm import tqdm

from dsp_kernels.env import describe_environment


def main() -> None:
    """Write one JSON file and print one line per network and batch."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", nargs="+", default=["resnet56_g4", "resnet18_g2_80", "resnet50_g2_80"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--kernels", default="auto")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    able, reason = cuda_available()
    if not able:
        raise SystemExit(f"layer times need a GPU: {reason}")
    dtype = getattr(torch, options.dtype)
    peaks = measure_peaks("cuda", (dtype,))
    found = []
    for name in options.net:
        program = load_network(NetworkSource(name)).program("packed")
        for batch in options.batch:
            times = list(
                tqdm(
                    layer_times(program, batch, dtype, peaks, options.kernels),
                    desc=f"{name}, batch {batch}",
                    leave=False,
                )
            )
            found += times
            total = sum(time.seconds for time in times)
            middle = statistics.median(time.fraction for time in times)
            print(
                f"{name}, batch {batch}, {times[0].layout}: {len(times)} convolutions, {1e6 * total:.0f} us, "
                f"median fraction of the floor {middle:.2f}"
            )
    write_times(options.out, "layers", found, describe_environment())


if __name__ == "__main__":
    main()
