"""Accuracy of ResNet-20 by kind of pruning, with the same number of epochs for every kind.

``python scripts/evidence/accuracy.py FOLDER`` trains (CIFAR-10 as JPEG from $DSP_SHARED, one thread,
bfloat16, channels_last) with checkpoints in FOLDER, continues from the last epoch if it was interrupted, and
adds each result to benchmarks/results/accuracy_resnet20.json. ``--table`` prints that file in Markdown.
"""

import argparse
import io
import itertools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dsp_kernels.whole_file import write_text
from dsp_pruning import assign_groups
from dsp_pruning.data import ImageData, Split
from dsp_pruning.data.load import CIFAR10_MEAN, CIFAR10_STD
from dsp_pruning.models import cifar_resnet
from dsp_pruning.recipes.checkpoint import has_checkpoint, load_weights, restore_weights
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune, load_pruned
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain
from dsp_pruning.recipes.run import MODEL, SUMMARY
from dsp_pruning.recipes.training import evaluate
from dsp_pruning.released.download import find_shared

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "accuracy_resnet20.json"
RATES = (0.8, 0.6)
EPOCHS = {"filters": (10, 0, 10), "weights": (10, 0, 10), "learned": (10, 4, 6), "scratch": (0, 14, 6)}
SHORT = {"filters": (10, 0, 3), "weights": (10, 0, 3), "learned": (10, 4, 3)}
NAMES = {
    "filters": "filters by magnitude",
    "weights": "groups from weights",
    "learned": "learned, from weights",
    "scratch": "learned, from scratch",
}
STRENGTHS = (2.5, 8.0, 25.0)  # total shrinkage, lambda times steps; the published schedule has 84
RATES_OF_LEARNING = (0.015, 0.05, 0.1)  # of finetuning
COMMON = {"batch_size": 64, "device": "cpu", "precision": "bfloat16", "channels_last": True}
Weights = dict[str, Tensor]


def cifar(train: int) -> ImageData:
    """CIFAR-10 as JPEG: these many training images, 2,500 for validation and all 10,000 for tests."""
    file = find_shared("data/cifar10_jpeg.npz")
    if file is None:
        raise SystemExit("no data/cifar10_jpeg.npz: set DSP_SHARED")
    arrays = np.load(file)

    def split(part: str, first: int, last: int) -> Split:
        files, ends, labels = (arrays[f"{part}_{name}"] for name in ("bytes", "offsets", "labels"))
        places = np.random.default_rng(0).permutation(len(labels))[first:last]  # the file is sorted by class
        images = [Image.open(io.BytesIO(files[ends[i] : ends[i + 1]].tobytes())) for i in places]
        pixels = torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images]))
        return Split(pixels.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels[places]).long())

    splits = split("train", 0, train), split("train", train, train + 2500), split("test", 0, 10_000)
    return ImageData("cifar10-jpeg", *splits, CIFAR10_MEAN, CIFAR10_STD, 10, flip=True, crop_padding=4)


class Evidence:
    """Runs with one seed. folder: of checkpoints. prefix: of the names of the runs, but for the dense one."""

    def __init__(
        self, folder: Path, data: ImageData, seed: int, epochs: dict[str, tuple[int, int, int]], prefix: str
    ) -> None:
        self.folder, self.data, self.seed = folder / f"seed {seed}", data, seed
        self.epochs, self.prefix = epochs, prefix
        # The recipes see neither the test images nor, in every epoch, all validation images.
        seen = data.validation[torch.arange(500)]
        self.training = replace(data, validation=seen, test=seen)

    def stage(self, recipe: Callable[..., Any], config: Any, name: str, *weights: Weights) -> Weights:
        """The weights that a recipe ends with."""
        folder = self.folder / name
        if not (folder / SUMMARY).exists():
            recipe(self.training, *weights, config, folder, resume=has_checkpoint(folder))
        return load_weights(folder / MODEL)[0]

    def dense(self) -> Weights:
        config = PretrainConfig(epochs=self.epochs["weights"][0], warmup_epochs=1, seed=self.seed, **COMMON)
        return self.stage(pretrain, config, "dense")

    def groups(self, kind: str, rate: float, strength: float) -> Weights:
        """Weights before pruning, with group logits."""
        epochs = self.epochs[kind][1]
        model = cifar_resnet(20, generator=torch.Generator().manual_seed(self.seed))
        if kind != "scratch":
            restore_weights(model, self.dense(), "dense")
        if not epochs:
            assign_groups(model, 1 if kind == "filters" else 4, rate)
            return model.state_dict()
        config = LearnGroupsConfig(
            epochs=epochs,
            regularize=strength / (epochs * len(self.data.train) / COMMON["batch_size"]),
            group_lr=0.01,
            # Learning from scratch takes the cheaper mode: 14 epochs of the other one did not fit.
            second_order="none" if kind == "scratch" else "exact",
            init="random" if kind == "scratch" else "weights",
            prune=0.7,  # between the two rates
            seed=self.seed,
            **COMMON,
        )
        return self.stage(
            learn_groups, config, f"{self.prefix}{kind}, learned at {strength:g}", model.state_dict()
        )

    def finetuned(self, kind: str, rate: float, lr: float, strength: float, on: Split) -> dict[str, Any]:
        """Accuracy after pruning and finetuning."""
        alone = {"groups": 1, "fp_every_nth_conv": 1, "prune_channels": False} if kind == "filters" else {}
        config = FinetuneConfig(
            epochs=self.epochs[kind][2], lr=lr, prune=rate, cycles=1, seed=self.seed, **alone, **COMMON
        )
        name = f"{self.prefix}{kind}, {rate}, lr {lr:g}, strength {strength:g}"
        self.stage(finetune, config, name, self.groups(kind, rate, strength))
        folder = self.folder / name
        model = load_pruned(folder / MODEL).to(memory_format=torch.channels_last)

        def scored(images: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return model(images)

        summary = json.loads((folder / SUMMARY).read_text())
        rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
        return {
            "kind": kind,
            "rate": rate,
            "seed": self.seed,
            "lr": lr,
            "strength": strength,
            "accuracy": evaluate(scored, self.data, on).accuracy,
            "pruned_flops": summary["pruned_flops"],
            "pruned_params": summary["pruned_params"],
            "just_pruned": summary["accuracy_before_finetuning"],
            "seconds_per_epoch": statistics.median(float(row[-1]) for row in rows[1:]),
        }


def choose(found: dict[str, Any], short: Evidence) -> tuple[float, float]:
    """One learning rate for all kinds, and one strength: the best of short runs, on validation images."""

    def accuracy(kind: str, lr: float, strength: float) -> float:
        key = {"kind": kind, "lr": lr, "strength": strength}
        if not any(key.items() <= row.items() for row in found["choice"]):
            found["choice"].append(short.finetuned(kind, 0.8, lr, strength, short.data.validation))
            store(found)
        return next(row["accuracy"] for row in found["choice"] if key.items() <= row.items())

    rates = {lr: accuracy("filters", lr, 0.0) + accuracy("weights", lr, 0.0) for lr in RATES_OF_LEARNING}
    lr = max(rates, key=rates.__getitem__)
    return lr, max(STRENGTHS, key=lambda strength: accuracy("learned", lr, strength))


def store(found: dict[str, Any]) -> None:
    """Write the results, one run a line."""
    write_text(RESULTS, json.dumps(found).replace('{"kind"', '\n{"kind"') + "\n")


def table(found: dict[str, Any]) -> None:
    """Print the mean accuracy, that of each seed, and half of the 95 % interval."""
    print("| kind | pruned FLOPs | accuracy | seeds | +- | just pruned |\n|---|---|---:|---|---:|---:|")
    for rate, kind, lr in sorted({(row["rate"], row["kind"], row["lr"]) for row in found["runs"]}):
        rows = [r for r in found["runs"] if (r["rate"], r["kind"], r["lr"]) == (rate, kind, lr)]
        each = [100 * row["accuracy"] for row in rows]
        mean = statistics.mean(each)
        # Of the images, and of the seeds where there are several.
        error = math.hypot(
            math.sqrt(mean * (100 - mean) / found["test_images"] / len(each)),
            statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else 0,
        )
        flops = statistics.mean(row["pruned_flops"] for row in rows)
        pruned = 100 * statistics.mean(row["just_pruned"] for row in rows)
        seeds = ", ".join(f"{value:.2f}" for value in each)
        cells = f"{flops:.1f} % | {mean:.2f} | {seeds} | +-{1.96 * error:.2f} | {pruned:.1f}"
        print(f"| {NAMES[kind]}, lr {lr:g} | {cells} |")


def main() -> None:
    """Train, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=15_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(NAMES))
    parser.add_argument("--table", action="store_true")
    given = parser.parse_args()
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"choice": [], "runs": []}
    if given.table:
        return table(found)
    torch.set_num_threads(1)
    if found.get("images", given.images) != given.images:
        parser.error(f"{RESULTS} is of {found['images']} images")
    found |= {"images": given.images, "test_images": 10_000, "epochs": EPOCHS}
    data = cifar(given.images)
    few = replace(data, train=data.train[torch.arange(given.images // 3)])
    full = Evidence(given.folder, data, given.seed, EPOCHS, "")
    Evidence(given.folder, data, 0, EPOCHS, "").dense()  # on all images, before the short runs start from it
    short = Evidence(given.folder, few, 0, SHORT, "short ")
    lr, strength = choose(found, short)
    for rate, kind in itertools.product(RATES, given.kinds):
        settings = {"kind": kind, "rate": rate, "seed": given.seed, "lr": lr}
        if not any(settings.items() <= row.items() for row in found["runs"]):
            own = strength if EPOCHS[kind][1] else 0.0
            found["runs"].append(full.finetuned(kind, rate, lr, own, full.data.test))
            store(found)


if __name__ == "__main__":
    main()
