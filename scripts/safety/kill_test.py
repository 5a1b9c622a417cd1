"""Kill training runs with SIGKILL at random moments, resume them, and compare with an uninterrupted run.

``python scripts/safety/kill_test.py --kills 20``: pretraining, group learning and finetuning of the smallest
CIFAR ResNet on digits. Exit status 1 if a bit of the final weights or metrics differs.
"""

import argparse
import csv
import multiprocessing
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dsp_pruning.data import ImageData, load_digits
from dsp_pruning.recipes.checkpoint import has_checkpoint, load_weights
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain
from dsp_pruning.recipes.run import METRICS, MODEL, SUMMARY

STAGES = ("pretrain", "learn", "finetune")


def main() -> int:
    """Kill, resume and compare; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6, help="of each stage")
    parser.add_argument("--longest", type=float, default=1.2, help="largest time before a kill, in seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    torch.set_num_threads(1)
    digits = load_digits(size=8)
    data = replace(digits, train=digits.train[torch.arange(128)])  # an epoch takes about a tenth of a second
    chance = random.Random(given.seed)
    # Forked children need not import torch. The uninterrupted run comes last: nobody forks after training.
    fork = multiprocessing.get_context("fork")
    moments: list[str] = []
    runs: list[Path] = []
    with tempfile.TemporaryDirectory() as name:
        while len(moments) < given.kills or not runs:
            folder = Path(name) / f"killed{len(runs)}"
            training = fork.Event()
            worker = fork.Process(target=train, args=(data, folder, given.epochs, training.set))
            worker.start()
            while worker.is_alive() and not training.wait(0.1):
                pass
            if len(moments) < given.kills:
                time.sleep(chance.uniform(0, given.longest))
                worker.kill()
            worker.join()
            if worker.exitcode == 0:
                runs.append(folder)
            elif worker.exitcode == -9:
                moments.append(next((s for s in STAGES[::-1] if (folder / s / METRICS).is_file()), "nothing"))
            else:
                print(f"the run could not be resumed after {len(moments)} kills")
                return 1
        alone = Path(name) / "alone"
        train(data, alone, given.epochs)
        different = {s for s in STAGES for run in runs if result(run / s) != result(alone / s)}
    print(f"{len(moments)} kills in {len(runs)} runs, in: {', '.join(moments)}")
    print(f"stages that differ: {', '.join(sorted(different)) or 'none'}")
    return 1 if different else 0


def train(data: ImageData, folder: Path, epochs: int, started: Callable[[], None] = lambda: None) -> None:
    """Run the stages that are not complete, from their last checkpoint. started: called in every step."""
    torch.seed()  # what a forked child inherits must not matter
    # PyTorch replaces its thread pool after a fork, and crashes if two threads do that at once.
    torch.set_num_threads(1)
    common: dict[str, Any] = {"depth": 8, "epochs": epochs, "batch_size": 32, "device": "cpu"}
    weights: dict[str, torch.Tensor] = {}
    for stage in STAGES:
        directory = folder / stage
        recipe: Callable[..., Any] = {
            "pretrain": partial(pretrain, data, PretrainConfig(**common)),
            "learn": partial(learn_groups, data, weights, LearnGroupsConfig(**common, groups=2)),
            "finetune": partial(finetune, data, weights, FinetuneConfig(**common, groups=2, cycles=3)),
        }[stage]
        if not (directory / SUMMARY).is_file():
            recipe(directory=directory, resume=has_checkpoint(directory), progress=lambda *_: started())
        weights, _ = load_weights(directory / MODEL)


def result(directory: Path) -> tuple[list[dict[str, str]], dict[str, bytes], str]:
    """Metrics without seconds, the bytes of every weight, and the summary."""
    with (directory / METRICS).open() as file:
        rows = [{name: row[name] for name in row if name != "seconds"} for row in csv.DictReader(file)]
    weights, _ = load_weights(directory / MODEL)
    as_bytes = {name: value.contiguous().numpy().tobytes() for name, value in weights.items()}
    return rows, as_bytes, (directory / SUMMARY).read_text()


if __name__ == "__main__":
    sys.exit(main())
