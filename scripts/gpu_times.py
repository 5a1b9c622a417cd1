"""Times all that could run each convolution and block of a network on a GPU; the fastest is shown first.

    python scripts/gpu_times.py --net NAME [--structure S] --out FILE [--batch N ...]

``fuse`` measures the same within five seconds per input shape.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from dsp_benchmarks.subjects.networks import NetworkSource, load_network

from dsp_kernels.env import describe_environment
from dsp_kernels.run.gpu.program import GpuRunner
from dsp_kernels.run.gpu.tune import Choices, Launch, Tuner, gpu_seconds
from dsp_kernels.whole_file import write_text


class Recorder(Tuner):
    """Takes the fastest option and keeps the seconds of all, inf if it does not run; equal layers once."""

    def __init__(self, seconds: Callable[[Launch], float]) -> None:
        super().__init__(Choices(Path("/dev/null")), seconds)
        self.seconds = seconds
        self.times: dict[str, dict[str, float]] = {}
        self.seen: Counter[str] = Counter()

    def fastest(self, key: Any, options: Mapping[str, Callable[[], Launch]], *, always: bool = False) -> str:
        name = json.dumps(key)
        self.seen[name] += 1
        if name not in self.times:
            self.times[name] = {option: self._time(option, make) for option, make in options.items()}
        times = self.times[name]
        return min(times, key=lambda option: times[option])

    def _time(self, option: str, make: Callable[[], Launch]) -> float:
        try:
            return self.seconds(make())
        except Exception as error:  # the others are still measured
            print(f"{option} does not run: {error}")
            return math.inf


def main() -> None:
    """Print a line per convolution, block and network; write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--net", required=True)
    parser.add_argument("--structure")
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 32, 1])
    options = parser.parse_args()
    device = torch.device("cuda")
    source = NetworkSource(options.net, options.structure)
    program = load_network(source).program("packed").map_tensors(lambda t: t.to(device, torch.float16))
    found = []
    for batch in options.batch:
        recorder = Recorder(partial(gpu_seconds, device))
        runner = GpuRunner(program, make_tuner=lambda device, what, recorder=recorder: recorder)
        plan = runner.plan([(batch, *program.shapes[name][1:]) for name in program.inputs])
        for name, times in recorder.times.items():
            what, _, *key = json.loads(name)
            sizes = [part for part in key if isinstance(part, list) and all(isinstance(n, int) for n in part)]
            label = f"{options.net}, batch {batch}, {recorder.seen[name]} x {what} of {sizes[0]}"
            shown = ", ".join(
                f"{option} {1e6 * times[option]:.1f}" for option in sorted(times, key=times.get)
            )
            print(f"{label}, us: {shown}", flush=True)
            found.append(
                {"batch": batch, "what": what, "key": key, "count": recorder.seen[name], "seconds": times}
            )
        print("\n".join(f"  {step}: {form}" for step, form in plan.forms.items()), flush=True)
        plain = {"environment": describe_environment(), "network": options.net, "times": found}
        write_text(options.out, json.dumps(plain) + "\n")


if __name__ == "__main__":
    main()
