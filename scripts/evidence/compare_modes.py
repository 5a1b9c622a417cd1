"""Learned groups against their alternatives: from one dense ResNet, every variant at equal pruned FLOPs.

``python scripts/evidence/compare_modes.py --data-root FOLDER --out FOLDER`` trains on ``cifar10_jpeg.npz``
(JPEG copies of CIFAR-10), resumes where it was stopped, and prints a table of the results.
"""

import argparse
import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dsp_kernels.errors import DSPTrainingError
from dsp_kernels.whole_file import write_text
from dsp_pruning.data import ImageData, Split, stratified_split
from dsp_pruning.data.load import CIFAR10_MEAN, CIFAR10_STD
from dsp_pruning.layers import select_layers
from dsp_pruning.learn.wrapper import SecondOrder
from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.recipes.checkpoint import has_checkpoint, load_weights
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain
from dsp_pruning.recipes.run import METRICS, MODEL, SUMMARY
from dsp_pruning.recipes.training import Progress, RecipeResult

RESULTS, TABLE, SETTINGS = "results.json", "results.md", "settings.json"
FIXED_LOGIT = 200.0  # the softmax stays 0 or 1 for any Gumbel noise and after 1e4 steps of Adam


@dataclass(frozen=True)
class Variant:
    """groups: ``learned``, ``contiguous``, ``random``, or ``none``: filters by magnitude, no penalty."""

    label: str
    groups: str
    second_order: SecondOrder = "none"


VARIANTS = {
    "none": Variant("learned groups, mode `none`", "learned"),
    "exact": Variant("learned groups, mode `exact`", "learned", "exact"),
    "original": Variant("learned groups, mode `original`", "learned", "original"),
    "filters": Variant("filter pruning by magnitude", "none"),
    "contiguous": Variant("fixed contiguous groups", "contiguous"),
    "random": Variant("fixed random groups", "random"),
}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A schedule for one CPU. regularize and group_lr exceed the published ones, for fewer steps.

    train_images: a tenth as many others are the validation split. prune: share of the grouped layers' FLOPs.
    seeds: number of seeds of learning and finetuning; there is one dense network.
    """

    depth: int = 20
    train_images: int = 10_000
    batch_size: int = 128
    dense_epochs: int = 30
    learn_epochs: int = 8
    finetune_epochs: int = 12
    groups: int = 4
    prune: float = 0.6
    regularize: float = 4e-2
    group_lr: float = 1e-2
    seeds: int = 1


def compare(
    data: ImageData,
    config: CompareConfig,
    directory: Path,
    stage: Callable[[str], Progress | None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Run the stages that ``directory`` lacks and return one row per variant and seed.

    stage: name of a stage -> its progress callback. Raises DSPTrainingError for results of other settings.
    """
    settings = {name: value for name, value in asdict(config).items() if name != "seeds"}
    path = directory / SETTINGS
    if path.is_file() and (found := json.loads(path.read_text())) != settings:
        raise DSPTrainingError(f"{directory} contains a comparison with other settings: {found}")
    write_text(path, json.dumps(settings, indent=2) + "\n")

    common: dict[str, Any] = {"depth": config.depth, "batch_size": config.batch_size}
    common |= {"device": "cpu", "channels_last": True}
    pretraining = PretrainConfig(epochs=config.dense_epochs, seed=0, **common)
    dense = _once(directory / "dense", partial(pretrain, data, pretraining), stage("dense"))
    rows: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        for name, variant in VARIANTS.items():
            folder, grouped = directory / f"{name}_seed{seed}", variant.groups != "none"
            settings = {**common, "seed": seed, "groups": config.groups if grouped else 1}
            learning = LearnGroupsConfig(
                epochs=config.learn_epochs,
                regularize=config.regularize if grouped else 0.0,
                group_lr=config.group_lr,
                second_order=variant.second_order,
                **settings,
            )
            pruning = FinetuneConfig(
                epochs=config.finetune_epochs,
                prune=config.prune,
                fp_every_nth_conv=2 if grouped else 1,
                prune_channels=grouped,
                cycles=1,
                **settings,
            )
            start = dense["weights"] | _fixed_groups(variant, config, data, seed)
            run = partial(learn_groups, data, start, learning)
            learned = _once(folder / "learn", run, stage(f"{name}, seed {seed}: learn"))
            run = partial(finetune, data, learned["weights"], pruning)
            pruned = _once(folder / "finetune", run, stage(f"{name}, seed {seed}: finetune"))
            row = {"variant": name, "seed": seed, "just_pruned": pruned["accuracy_before_finetuning"]}
            row |= {what: pruned[what] for what in ("pruned_flops", "pruned_params")}
            rows.append(row | {"accuracy": pruned["test"]["accuracy"], "learn_seconds": learned["seconds"]})
            accuracy = dense["test"]["accuracy"]
            content = {"config": asdict(config), "data": data.name, "dense": accuracy, "rows": rows}
            write_text(directory / RESULTS, json.dumps(content, indent=2) + "\n")
            write_text(directory / TABLE, markdown(rows, config.learn_epochs))
    return rows


def markdown(rows: Sequence[Mapping[str, Any]], learn_epochs: int) -> str:
    """A table of the results."""
    lines = [
        "| variant | seed | pruned FLOPs | pruned params | just pruned | finetuned | s/epoch learning |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {VARIANTS[row['variant']].label} | {row['seed']} | {row['pruned_flops']:.1f} % "
        f"| {row['pruned_params']:.1f} % | {100 * row['just_pruned']:.2f} % | {100 * row['accuracy']:.2f} % "
        f"| {row['learn_seconds'] / learn_epochs:.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _once(folder: Path, run: Callable[..., RecipeResult], progress: Progress | None) -> dict[str, Any]:
    """Weights and summary of a stage, which runs (or resumes) unless it is complete."""
    if not (folder / SUMMARY).is_file():
        run(directory=folder, resume=has_checkpoint(folder), progress=progress)
    weights, _ = load_weights(folder / MODEL)
    with (folder / METRICS).open(encoding="utf-8") as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    return {**json.loads((folder / SUMMARY).read_text()), "weights": weights, "seconds": seconds}


def _fixed_groups(variant: Variant, config: CompareConfig, data: ImageData, seed: int) -> dict[str, Tensor]:
    """Logits [G, O] per layer that neither noise nor training changes; empty for learned groups."""
    if variant.groups not in ("contiguous", "random"):
        return {}
    generator = torch.Generator().manual_seed(seed)
    logits = {}
    for layer in select_layers(cifar_resnet(config.depth, 10, data.channels), data.example()):
        groups = torch.arange(layer.out_channels) * config.groups // layer.out_channels
        if variant.groups == "random":
            groups = groups[torch.randperm(len(groups), generator=generator)]
        one_hot = torch.nn.functional.one_hot(groups, config.groups).T
        logits[f"{layer.name}.group"] = one_hot.float() * FIXED_LOGIT
    return logits


def load_jpeg(path: Path, train_images: int) -> ImageData:
    """CIFAR-10 with that many training images, a tenth as many for validation, and all test images."""
    with np.load(path) as archive:
        labels = torch.from_numpy(archive["train_labels"]).long()
        generator = torch.Generator().manual_seed(0)
        rest, held = stratified_split(labels, 0.1, torch.Generator().manual_seed(0))
        chosen = []
        for positions, count in ((rest, train_images), (held, train_images // 10)):
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


def main() -> None:
    """Compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-root", type=Path, required=True, help="folder of cifar10_jpeg.npz")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and results")
    for name, value in asdict(CompareConfig()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args())
    root, out = given.pop("data_root"), given.pop("out")
    config = CompareConfig(**given)
    data = load_jpeg(root / "cifar10_jpeg.npz", config.train_images)
    compare(data, config, out, lambda name: lambda done, total, text: print(name, text))
    print((out / TABLE).read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
