"""Kill a training run at random moments with SIGKILL, resume it, and compare it with one left alone.

``python scripts/kill_test.py --kills 20``: pretraining, group learning and finetuning of the smallest CIFAR
ResNet on digits, one thread. Exit status 1 if a single bit of the final weights or metrics differs.
"""

from __future__ import annotations

import argparse
import csv
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dsp_pruning.data import ImageData, load_digits
from dsp_pruning.recipes.checkpoint import LAST, PREVIOUS, load_weights
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain
from dsp_pruning.recipes.run import MODEL, SUMMARY
from dsp_pruning.recipes.training import METRICS, Progress

STAGES = ("pretrain", "learn", "finetune")
READY = "ready"


def main() -> int:
    """The parent: start, kill, start again, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=6, help="of each stage")
    parser.add_argument("--longest", type=float, default=1.2, help="seconds of work before a kill, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.worker is not None:
        train(few_digits(), given.worker, given.epochs, ready)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return compare(Path(folder), given)


def compare(folder: Path, given: argparse.Namespace) -> int:
    """Exit status 0 if every run that was killed ends as the one that was not."""
    train(few_digits(), folder / "alone", given.epochs)
    chance = random.Random(given.seed)
    moments: list[str] = []
    different: set[str] = set()
    runs = left = 0
    while len(moments) < given.kills or not runs:
        killed = folder / f"killed{runs}"
        command = [sys.executable, __file__, "--epochs", str(given.epochs), "--worker", str(killed)]
        while True:
            worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert worker.stdout is not None
            worker.stdout.readline()
            if len(moments) < given.kills:
                time.sleep(chance.uniform(0, given.longest))
                if worker.poll() is None:
                    worker.send_signal(signal.SIGKILL)
                    worker.wait()
                    moments.append(where(killed))
                    continue
            if worker.wait() != 0:
                print(f"the run did not go on after {len(moments)} kills")
                return 1
            break
        runs += 1
        different |= {stage for stage in STAGES if result(folder / "alone" / stage) != result(killed / stage)}
        left += len(list(killed.rglob("*.tmp*")))
    print(f"{len(moments)} kills in {runs} runs, after: {', '.join(moments)}")
    print(f"stages that differ: {', '.join(sorted(different)) or 'none'}; temporary files left: {left}")
    return 1 if different else 0


def ready(done: int, total: int, text: str) -> None:
    """Tell the parent that training is under way: from here on there is something to lose."""
    print(READY, flush=True)


def train(data: ImageData, folder: Path, epochs: int, progress: Progress | None = None) -> None:
    """The three trainings, each from its last checkpoint, or not at all if it is done."""
    common: dict[str, Any] = {"depth": 8, "epochs": epochs, "batch_size": 32, "device": "cpu"}
    runs: dict[str, Any] = {
        "pretrain": lambda weights, **more: pretrain(data, PretrainConfig(**common), **more),
        "learn": lambda weights, **more: learn_groups(
            data, weights, LearnGroupsConfig(**common, groups=2), **more
        ),
        "finetune": lambda weights, **more: finetune(
            data, weights, FinetuneConfig(**common, groups=2, cycles=3), **more
        ),
    }
    weights: dict[str, torch.Tensor] = {}
    for stage in STAGES:
        directory = folder / stage
        if not (directory / SUMMARY).is_file():
            resume = any((directory / name).is_file() for name in (LAST, PREVIOUS))
            runs[stage](weights, directory=directory, resume=resume, progress=progress)
        weights, _ = load_weights(directory / MODEL)


def few_digits() -> ImageData:
    """128 training images, so that an epoch takes about a tenth of a second."""
    digits = load_digits(size=8)
    return replace(digits, train=digits.train[torch.arange(128)])


def where(folder: Path) -> str:
    """Stage and whole epochs done, as the files tell."""
    for stage in reversed(STAGES):
        if (folder / stage / METRICS).is_file():
            done = len((folder / stage / METRICS).read_text().splitlines()) - 1
            return f"{stage} {max(done, 0)}"
    return "nothing"


def result(directory: Path) -> tuple[list[dict[str, str]], dict[str, bytes], str]:
    """Metrics without seconds, the bytes of every weight, and the summary."""
    with (directory / METRICS).open() as file:
        rows = [
            {name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)
        ]
    weights, _ = load_weights(directory / MODEL)
    as_bytes = {name: value.contiguous().numpy().tobytes() for name, value in weights.items()}
    return rows, as_bytes, (directory / SUMMARY).read_text()


if __name__ == "__main__":
    sys.exit(main())
