"""Compare the CPU speed of two trees of this package, each built in place, in one process each, by turns.

``python scripts/evidence/compare_versions.py OLD NEW`` times fused ResNet-56 g=4 (from $DSP_SHARED) at batch
1, 8 and 32. A second process of the old tree is the control. Only one works at a time, in a new random order
per block. Prints medians, and the median, 10th and 90th percentile of new / old and of control / old.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

BATCHES = (1, 8, 32)
CHILD = f"""
import os, statistics, sys, time
from pathlib import Path
import torch, dsp_kernels
from dsp_pruning import read_released
fused = dsp_kernels.fuse(
    read_released(Path(os.environ["DSP_SHARED"]) / "nets" / "resnet56_g4.npz"), torch.randn(1, 3, 32, 32)
)
images = {{batch: torch.randn(batch, 3, 32, 32) for batch in {BATCHES}}}
print(dsp_kernels.__file__, flush=True)
for line in sys.stdin:
    times, end = [], time.perf_counter() + 0.25
    while time.perf_counter() < end:
        began = time.perf_counter()
        fused(images[int(line)])
        times.append(time.perf_counter() - began)
    print(statistics.median(times[len(times) // 5 :]), flush=True)
"""


def main() -> None:
    """Run the processes by turns and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--blocks", type=int, default=30)
    given = parser.parse_args()
    children = {}
    for name, tree in (("old", given.old), ("new", given.new), ("control", given.old)):
        environment = os.environ | {"PYTHONPATH": f"{tree.resolve()}:{tree.resolve() / 'python'}"}
        children[name] = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env=environment,
            cwd=tree,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(name, children[name].stdout.readline().strip())
    order = random.Random(0)
    for batch in BATCHES:
        seconds: dict[str, list[float]] = {name: [] for name in children}
        for _ in range(given.blocks):
            for name in order.sample(list(children), len(children)):
                print(batch, file=children[name].stdin, flush=True)
                seconds[name].append(float(children[name].stdout.readline()))
        for name in ("new", "control"):
            ratios = [one / old for one, old in zip(seconds[name], seconds["old"], strict=True)]
            low, *_, high = statistics.quantiles(ratios, n=10)
            median = 1e3 * statistics.median(seconds[name])
            ratio = f"median {statistics.median(ratios):.3f}, 10 % {low:.3f}, 90 % {high:.3f}"
            print(f"batch {batch:<3} {name:<8} median {median:9.3f} ms   / old: {ratio}")


if __name__ == "__main__":
    main()
