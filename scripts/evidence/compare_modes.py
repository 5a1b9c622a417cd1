"""Learned groups against their alternatives: from one dense ResNet-20, every variant at equal pruned FLOPs.

``python scripts/evidence/compare_modes.py --data-root FOLDER --out FOLDER`` trains on ``cifar10_jpeg.npz``
(JPEG copies of CIFAR-10), resumes where it was stopped, and prints a table of the results.
"""

import argparse
import csv
import io
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsp_kernels.whole_file import write_text
from dsp_pruning.data import ImageData, Split, stratified_split
from dsp_pruning.data.load import CIFAR10_MEAN, CIFAR10_STD
from dsp_pruning.layers import select_layers
from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.recipes.checkpoint import has_checkpoint, load_weights
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain
from dsp_pruning.recipes.run import METRICS, MODEL, SUMMARY
from dsp_pruning.recipes.training import RecipeResult

# A schedule for one CPU: lambda and learning rate of the logits exceed the published ones, for fewer steps.
TRAIN_IMAGES, GROUPS, SEED = 10_000, 4, 0
COMMON: dict[str, Any] = {
    "depth": 20,
    "batch_size": 128,
    "seed": SEED,
    "device": "cpu",
    "channels_last": True,
}
DENSE = PretrainConfig(epochs=30, **COMMON)
LEARN: dict[str, Any] = {**COMMON, "epochs": 8, "regularize": 4e-2, "group_lr": 1e-2, "groups": GROUPS}
PRUNE: dict[str, Any] = {**COMMON, "epochs": 12, "prune": 0.6, "cycles": 1, "groups": GROUPS}
# Of filters by magnitude: no penalty while the others learn groups, and whole filters of every layer.
NO_PENALTY: dict[str, Any] = {"groups": 1, "regularize": 0.0, "second_order": "none"}
WHOLE_FILTERS: dict[str, Any] = {"groups": 1, "fp_every_nth_conv": 1, "prune_channels": False}
# Settings of learning and of pruning that differ from the above.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "learned groups, mode `none`": ({"second_order": "none"}, {}),
    "learned groups, mode `exact`": ({"second_order": "exact"}, {}),
    "learned groups, mode `original`": ({"second_order": "original"}, {}),
    "filter pruning by magnitude": (NO_PENALTY, WHOLE_FILTERS),
    "fixed contiguous groups": ({"second_order": "none"}, {}),
    "fixed random groups": ({"second_order": "none"}, {}),
}
FIXED_LOGIT = 200.0  # the softmax stays 0 or 1 for any Gumbel noise and after 1e4 steps of Adam
COLUMNS = "variant | pruned FLOPs | pruned params | just pruned | finetuned | s/epoch learning"


def main() -> None:
    """Run the stages that are missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of cifar10_jpeg.npz")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and results")
    given = parser.parse_args()
    data = load_jpeg(given.data_root / "cifar10_jpeg.npz")
    dense = once(given.out / "dense", partial(pretrain, data, DENSE))
    rows = []
    for name, (learning, pruning) in VARIANTS.items():
        folder = given.out / name.replace(" ", "_").replace("`", "")
        start = dense["weights"] | fixed_groups(name, data)
        config = LearnGroupsConfig(**LEARN | learning)
        learned = once(folder / "learn", partial(learn_groups, data, start, config))
        cut = FinetuneConfig(**PRUNE | pruning)
        pruned = once(folder / "finetune", partial(finetune, data, learned["weights"], cut))
        row = {what: pruned[what] for what in ("pruned_flops", "pruned_params")}
        row |= {"just_pruned": pruned["accuracy_before_finetuning"], "accuracy": pruned["test"]["accuracy"]}
        rows.append({"variant": name, **row, "learn_seconds": learned["seconds"]})
    content = {"data": data.name, "dense": dense["test"]["accuracy"], "rows": rows}
    write_text(given.out / "results.json", json.dumps(content, indent=2) + "\n")
    print(f"dense: {100 * content['dense']:.2f} %\n\n| {COLUMNS} |\n{'|---' * 6}|")
    for row in rows:
        parts = [f"{row[what]:.1f} %" for what in ("pruned_flops", "pruned_params")]
        parts += [f"{100 * row[what]:.2f} %" for what in ("just_pruned", "accuracy")]
        print(
            "| "
            + " | ".join([row["variant"], *parts, f"{row['learn_seconds'] / LEARN['epochs']:.0f}"])
            + " |"
        )


def once(folder: Path, run: Callable[..., RecipeResult]) -> dict[str, Any]:
    """Weights and summary of a stage, which runs (or resumes) unless it is complete."""
    if not (folder / SUMMARY).is_file():
        run(directory=folder, resume=has_checkpoint(folder), progress=lambda *what: print(folder.name, *what))
    weights, _ = load_weights(folder / MODEL)
    with (folder / METRICS).open(encoding="utf-8") as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    return {**json.loads((folder / SUMMARY).read_text()), "weights": weights, "seconds": seconds}


def fixed_groups(variant: str, data: ImageData) -> dict[str, Tensor]:
    """Logits [G, O] per layer that neither noise nor training changes; empty for other variants."""
    if not variant.startswith("fixed"):
        return {}
    generator = torch.Generator().manual_seed(SEED)
    logits = {}
    for layer in select_layers(cifar_resnet(COMMON["depth"], 10, data.channels), data.example()):
        groups = torch.arange(layer.out_channels) * GROUPS // layer.out_channels
        if "random" in variant:
            groups = groups[torch.randperm(len(groups), generator=generator)]
        one_hot = torch.nn.functional.one_hot(groups, GROUPS).T
        logits[f"{layer.name}.group"] = one_hot.float() * FIXED_LOGIT
    return logits


def load_jpeg(path: Path) -> ImageData:
    """CIFAR-10 with TRAIN_IMAGES training images, a tenth as many for validation, and all test images."""
    with np.load(path) as archive:
        labels = torch.from_numpy(archive["train_labels"]).long()
        generator = torch.Generator().manual_seed(0)
        rest, held = stratified_split(labels, 0.1, torch.Generator().manual_seed(0))
        chosen = []
        for positions, count in ((rest, TRAIN_IMAGES), (held, TRAIN_IMAGES // 10)):
            # Slightly below the wanted share, because stratified_split rounds every class up.
            _, few = stratified_split(labels[positions], (count - 1e-6) / len(positions), generator)
            chosen.append(positions[few])
        train, validation = (decode(archive, "train", positions) for positions in chosen)
        test = decode(archive, "test", torch.arange(len(archive["test_labels"])))
    return ImageData("cifar10-jpeg", train, validation, test, CIFAR10_MEAN, CIFAR10_STD, 10, True, 4)


def decode(archive: Mapping[str, Any], part: str, positions: Tensor) -> Split:
    """The images at these positions of ``train`` or ``test``, from JPEG."""
    from PIL import Image

    files, offsets, labels = (archive[f"{part}_{what}"] for what in ("bytes", "offsets", "labels"))
    images = [
        np.asarray(Image.open(io.BytesIO(files[offsets[i] : offsets[i + 1]].tobytes())).convert("RGB"))
        for i in positions.tolist()
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    return Split(pixels, torch.from_numpy(labels).long()[positions])


if __name__ == "__main__":
    main()
