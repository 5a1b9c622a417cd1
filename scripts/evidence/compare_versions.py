"""Compare the CPU speed of two installed versions of this package, one child process each, by turns.

    python scripts/evidence/compare_versions.py OLD/.venv/bin/python NEW/.venv/bin/python --job latency

Jobs: latency (fused ResNet-56 g=4, batch 1, 8, 32) and build (PruneWrapper.initialize, pack and fuse of
ResNet-50 at 224 x 224). A second child of the old version is the control. Only one child works at a time, in
a new random order per block. Prints the median, 10th and 90th percentile of new / old and of old / old.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

SHARED = Path(__file__).resolve().parents[3] / "shared"


def latency_jobs(shared: Path) -> dict[str, Callable[[], float]]:
    """Median seconds of a call of the fused network over about 0.2 s."""
    import torch

    import dsp_kernels
    from dsp_pruning import read_released

    torch.set_num_threads(2)
    packed = read_released(shared / "nets" / "resnet56_g4.npz")
    fused = dsp_kernels.fuse(packed, torch.randn(1, 3, 32, 32))

    def job(batch: int) -> Callable[[], float]:
        images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))

        def run() -> float:
            times = []
            end = time.perf_counter() + 0.25
            while time.perf_counter() < end:
                begin = time.perf_counter()
                fused(images)
                times.append(time.perf_counter() - begin)
            return statistics.median(times[len(times) // 5 :])

        return run

    return {f"batch {batch}": job(batch) for batch in (1, 8, 32)}


def build_jobs(shared: Path) -> dict[str, Callable[[], float]]:
    """Seconds of one call each; every job makes its own input first."""
    import torch
    from torchvision.models import resnet50

    import dsp_kernels
    from dsp_pruning import PruneWrapper, pack

    image = torch.randn(1, 3, 224, 224)

    def wrapped() -> tuple[torch.nn.Module, PruneWrapper]:
        torch.manual_seed(0)
        model = resnet50().eval()
        pruner = PruneWrapper(model, n_groups=2, fp_every_nth_conv=2, example_input=image)
        for layer in pruner.layers:
            layer.conv.group.data.normal_()
        return model, pruner

    model, pruner = wrapped()
    pruner.initialize(0.6)
    packed = pack(model, image)

    def timed(call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    return {
        "initialize": lambda: timed(partial(wrapped()[1].initialize, 0.6)),
        "pack": lambda: timed(lambda: pack(model, image)),
        "fuse": lambda: timed(lambda: dsp_kernels.fuse(packed, image)),
    }


def child(job: str, shared: Path) -> None:
    """Answer each name on stdin with the seconds that its job took."""
    jobs = {"latency": latency_jobs, "build": build_jobs}[job](shared)
    print(json.dumps(list(jobs)), flush=True)
    for line in sys.stdin:
        print(jobs[line.strip()](), flush=True)


def main() -> None:
    """Run the children by turns and print the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", nargs="?")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--job", choices=["latency", "build"], default="latency")
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        return child(given.job, given.shared)
    command = [str(Path(__file__).resolve()), "--child", "--job", given.job, "--shared", str(given.shared)]
    children = {
        name: subprocess.Popen([python, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for name, python in (("old", given.old), ("new", given.new), ("control", given.old))
    }
    names, *_ = [json.loads(process.stdout.readline()) for process in children.values()]
    order = random.Random(0)
    ratios: dict[str, dict[str, list[float]]] = {name: {"new": [], "control": []} for name in names}
    seconds: dict[str, dict[str, list[float]]] = {name: {c: [] for c in children} for name in names}
    for _ in range(given.blocks):
        for name in names:
            times = {}
            for which in order.sample(list(children), len(children)):
                children[which].stdin.write(name + "\n")
                children[which].stdin.flush()
                times[which] = float(children[which].stdout.readline())
                seconds[name][which].append(times[which])
            for which in ratios[name]:
                ratios[name][which].append(times[which] / times["old"])
    for process in children.values():
        process.stdin.close()
        process.wait()
    for name in names:
        for which, values in ratios[name].items():
            low, *_, high = statistics.quantiles(values, n=10)
            median = statistics.median(seconds[name][which])
            print(
                f"{name:<12} {which:<8} median {median * 1e3:9.3f} ms   / old: median "
                f"{statistics.median(values):.3f}, 10 % {low:.3f}, 90 % {high:.3f}"
            )


if __name__ == "__main__":
    main()
