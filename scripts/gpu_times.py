"""Times all that could run each convolution and block of a network on a GPU, and the network as a whole.

    python scripts/gpu_times.py --net NAME [--structure S] [--batch N ...]

``fuse`` measures the same within five seconds per input shape.
"""

import argparse
import logging
import math
import os
from functools import partial
from pathlib import Path

import torch
from dsp_benchmarks.subjects.networks import NetworkSource, load_network

from dsp_kernels.run.gpu.program import GpuRunner
from dsp_kernels.run.gpu.tune import Choices, Tuner, gpu_seconds


def main() -> None:
    """Print a line per convolution, block and network, and what was chosen for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--net", required=True)
    parser.add_argument("--structure")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32, 1])
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dsp_kernels").setLevel(logging.DEBUG)
    device = torch.device("cuda")
    source = NetworkSource(options.net, options.structure)
    program = load_network(source).program("packed").map_tensors(lambda t: t.to(device, torch.float16))
    for batch in options.batch:
        print(f"{options.net}, batch {batch}", flush=True)
        choices = Choices(Path(os.devnull))  # equal layers are measured once
        tuner = Tuner(choices, partial(gpu_seconds, device), budget=math.inf)
        runner = GpuRunner(program, make_tuner=lambda device, what, tuner=tuner: tuner)
        plan = runner.plan([(batch, *program.shapes[name][1:]) for name in program.inputs])
        print("\n".join(f"  {step}: {form}" for step, form in plan.forms.items()), flush=True)


if __name__ == "__main__":
    main()
