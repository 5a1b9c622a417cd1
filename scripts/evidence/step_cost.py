"""Print what learning adds to a training step: time on this machine, and dispatched tensor operations.

All variants alternate within one run, in a random order per round. 3 x 32 x 32 images, float32.
``--clock cpu`` takes the process's CPU time, for a machine with other users.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsp_pruning import GroupWrapper
from dsp_pruning.models import cifar_resnet

MODES = ("plain", "none", "exact")
_NOTHING = nullcontext()


class Count(TorchDispatchMode):
    """Counts dispatched tensor operations."""

    operations = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return func(*args, **(kwargs or {}))


class Trainer:
    """A network that trains with SGD, and learns groups in one of the modes."""

    def __init__(self, depth: int, mode: Any) -> None:
        torch.manual_seed(0)
        self.model = cifar_resnet(depth).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        common = self.model, self.optimizer, F.cross_entropy, 2e-3, 1000, 4, 0.5
        self.learner = None if mode == "plain" else GroupWrapper(*common, second_order=mode)

    def step(self, x: Tensor, y: Tensor, own: Any = _NOTHING, plain: Any = _NOTHING) -> None:
        """One training step, the learner's part inside ``own`` and the rest inside ``plain``."""
        with own:
            if self.learner is not None:
                self.learner.initialize()
        with plain:
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
        with own:
            if self.learner is not None:
                self.learner.after_step(x, y)


def operations(depth: int, mode: str) -> int:
    """Of the learner's part; of the training step itself in mode "plain"."""
    trainer, own, plain = Trainer(depth, mode), Count(), Count()
    x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    trainer.step(x, y)  # the first step creates the optimizers' state
    trainer.step(x, y, own, plain)
    return own.operations or plain.operations


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depth", type=int, nargs="+", default=[20, 56])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    given = parser.parse_args()
    clock = time.perf_counter if given.clock == "wall" else time.process_time
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {given.rounds} rounds, {given.clock}"
    )
    print("| network | step | median, ms | p10, ms | p90, ms | over plain | operations of its part |")
    print("|---|---|---:|---:|---:|---:|---:|")
    x, y = torch.randn(given.batch, 3, 32, 32), torch.randint(10, (given.batch,))
    for depth in given.depth:
        trainers = {mode: Trainer(depth, mode) for mode in MODES}
        samples: dict[str, list[float]] = {mode: [] for mode in MODES}
        shuffler = random.Random(0)
        for round_ in range(given.rounds + 1):
            for mode in shuffler.sample(MODES, len(MODES)):
                started = clock()
                trainers[mode].step(x, y)
                if round_ > 0:  # the first one warms up
                    samples[mode].append(1e3 * (clock() - started))
        plain = statistics.median(samples["plain"])
        for mode, values in samples.items():
            low, *_, high = statistics.quantiles(values, n=10)
            middle = statistics.median(values)
            numbers = f"{middle:.1f} | {low:.1f} | {high:.1f} | {middle / plain:.2f}"
            print(f"| ResNet-{depth} | {mode} | {numbers} | {operations(depth, mode)} |", flush=True)


if __name__ == "__main__":
    main()
