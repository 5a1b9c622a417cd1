"""Print what the learner adds to a training step: time on this machine, and tensor operations dispatched.

All variants take turns within one run, in a random order per round. Batch 128 of 3 x 32 x 32, float32.
``--clock cpu`` takes the process's CPU time: on a machine that others use too, only that can be compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsp_pruning.learn.wrapper import GroupWrapper
from dsp_pruning.models import cifar_resnet

MODES = ("plain", "none", "exact")


class Count(TorchDispatchMode):
    """Counts the tensor operations that are dispatched while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


class Trainer:
    """One network that trains with SGD, and learns groups in one of the modes."""

    def __init__(self, depth: int, mode: str, total_steps: int = 1000) -> None:
        torch.manual_seed(0)
        self.model = cifar_resnet(depth).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        self.learner = None
        if mode != "plain":
            self.learner = GroupWrapper(
                self.model, self.optimizer, F.cross_entropy, 2e-3, total_steps, 4, 0.5, second_order=mode
            )

    def train(self, x: Tensor, y: Tensor) -> None:
        """Zero, forward, backward, step."""
        self.optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()

    def step(self, x: Tensor, y: Tensor) -> None:
        """A whole training step."""
        if self.learner is not None:
            self.learner.initialize()
        self.train(x, y)
        if self.learner is not None:
            self.learner.after_step(x, y)

    def dispatched(self, x: Tensor, y: Tensor) -> int:
        """Operations of ``initialize`` and ``after_step``; of the training step itself without a learner."""
        self.step(x, y)  # the optimizers make their state in the first one
        with Count() as before:
            if self.learner is not None:
                self.learner.initialize()
        with Count() as training:
            self.train(x, y)
        if self.learner is None:
            return len(training.operations)
        with Count() as after:
            self.learner.after_step(x, y)
        return len(before.operations) + len(after.operations)


def measure(depth: int, rounds: int, batch: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of every step, per mode."""
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    trainers = {mode: Trainer(depth, mode) for mode in MODES}
    samples: dict[str, list[float]] = {mode: [] for mode in MODES}
    order, shuffler = list(MODES), random.Random(0)
    for round_ in range(rounds + 1):
        shuffler.shuffle(order)
        for mode in order:
            started = clock()
            trainers[mode].step(x, y)
            if round_ > 0:  # the first one warms up
                samples[mode].append(clock() - started)
    return samples


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    arguments = parser.parse_args()
    clock = time.perf_counter if arguments.clock == "wall" else time.process_time
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.rounds} rounds, "
        f"{arguments.clock} time"
    )
    print("| network | step | median, ms | p10, ms | p90, ms | over plain | operations of its part |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for depth in arguments.depth:
        counts = {
            mode: Trainer(depth, mode).dispatched(torch.randn(4, 3, 32, 32), torch.randint(10, (4,)))
            for mode in MODES
        }
        samples = measure(depth, arguments.rounds, arguments.batch, clock)
        plain = statistics.median(samples["plain"])
        for mode, values in samples.items():
            low, *_, high = statistics.quantiles(values, n=10)
            middle = statistics.median(values)
            numbers = f"{1e3 * middle:.1f} | {1e3 * low:.1f} | {1e3 * high:.1f} | {middle / plain:.2f}"
            print(f"| ResNet-{depth} | {mode} | {numbers} | {counts[mode]} |", flush=True)


if __name__ == "__main__":
    main()
