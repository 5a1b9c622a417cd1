"""Learned groups against their rivals: one dense ResNet, and from it every variant at equal pruned FLOPs.

``python -m dsp_pruning.recipes.compare_modes --data-root FOLDER --out FOLDER`` goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsp_kernels.errors import DSPTrainingError
from dsp_kernels.whole_file import write_text
from dsp_pruning.data import ImageData, load_cifar10_jpeg, stratified_split
from dsp_pruning.layers import select_layers
from dsp_pruning.learn.wrapper import SecondOrder
from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.recipes.checkpoint import LAST, PREVIOUS, load_weights
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain
from dsp_pruning.recipes.run import MODEL, SUMMARY, RecipeResult
from dsp_pruning.recipes.training import METRICS, Progress

__all__ = ["RESULTS", "TABLE", "VARIANTS", "CompareConfig", "Variant", "compare", "few_images", "markdown"]

RESULTS, TABLE, SETTINGS = "results.json", "results.md", "settings.json"

# A softmax of logits this far apart is 0 or 1 whatever the Gumbel noise, and 1e4 steps of Adam leave it so.
_FIXED_LOGIT = 200.0


@dataclass(frozen=True)
class Variant:
    """One way to choose what goes.

    second_order: of group learning. groups: ``learned``, ``contiguous``, ``random`` or ``none``, which prunes
    whole filters in every layer by magnitude and spends the learning epochs on plain training.
    """

    label: str
    second_order: SecondOrder
    groups: str


VARIANTS: dict[str, Variant] = {
    "none": Variant("learned groups, mode `none`", "none", "learned"),
    "exact": Variant("learned groups, mode `exact`", "exact", "learned"),
    "original": Variant("learned groups, mode `original`", "original", "learned"),
    "filters": Variant("filter pruning by magnitude", "none", "none"),
    "contiguous": Variant("fixed contiguous groups", "none", "contiguous"),
    "random": Variant("fixed random groups", "none", "random"),
}


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A schedule for one CPU. regularize and group_lr are above the published ones, for fewer steps.

    train_images: images that teach; a tenth as many others choose the checkpoint. seeds: of learning and
    finetuning; the dense network is one for all. prune: share of the grouped layers' FLOPs.
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
    device: str = "cpu"


def compare(
    data: ImageData,
    config: CompareConfig,
    directory: Path,
    stage: Callable[[str], Progress | None] = lambda name: None,
) -> list[dict[str, Any]]:
    """Run what is missing in ``directory`` and return one row for each variant and seed.

    Every epoch is checkpointed, so a killed comparison loses the epoch it was in. ``results.json`` and
    ``results.md`` are written after every variant. stage: makes the progress callback of a named stage.
    Raises DSPTrainingError where the directory belongs to other settings.
    """
    _check_settings(config, directory)
    common: dict[str, Any] = {
        "depth": config.depth,
        "batch_size": config.batch_size,
        "device": config.device,
        "channels_last": True,
    }
    pretraining = PretrainConfig(epochs=config.dense_epochs, seed=0, **common)
    dense = _once(directory / "dense", lambda **more: pretrain(data, pretraining, **more), stage("dense"))
    rows: list[dict[str, Any]] = []
    for seed in range(config.seeds):
        for name, variant in VARIANTS.items():
            folder = directory / f"{name}_seed{seed}"
            grouped = variant.groups != "none"
            learning = LearnGroupsConfig(
                epochs=config.learn_epochs,
                groups=config.groups if grouped else 1,
                regularize=config.regularize if grouped else 0.0,
                group_lr=config.group_lr,
                second_order=variant.second_order,
                seed=seed,
                **common,
            )
            pruning = FinetuneConfig(
                epochs=config.finetune_epochs,
                groups=learning.groups,
                prune=config.prune,
                fp_every_nth_conv=2 if grouped else 1,
                prune_channels=grouped,
                cycles=1,
                seed=seed,
                **common,
            )
            start = dense["weights"] | _fixed_groups(variant, config, data, seed)
            learned = _once(
                folder / "learn",
                lambda start=start, learning=learning, **more: learn_groups(data, start, learning, **more),
                stage(f"{name}, seed {seed}: learn"),
            )
            weights = learned["weights"]
            pruned = _once(
                folder / "finetune",
                lambda weights=weights, pruning=pruning, **more: finetune(data, weights, pruning, **more),
                stage(f"{name}, seed {seed}: finetune"),
            )
            rows.append(_row(name, seed, learned, pruned))
            _write(directory, config, data, dense, rows)
    return rows


def few_images(data: ImageData, train_images: int) -> ImageData:
    """The data set with so many training images, a tenth as many for validation, and the whole test split.

    Every class keeps its share. The images are the same in every call.
    Raises DSPTrainingError where the data set has fewer.
    """
    wanted = {"train": train_images, "validation": train_images // 10}
    generator = torch.Generator().manual_seed(0)
    chosen = {}
    for name, count in wanted.items():
        split = getattr(data, name)
        if not 0 < count < len(split):
            raise DSPTrainingError(f"{count} {name} images asked of {data.name!r}, which has {len(split)}")
        # A hair below the share, because every class is rounded up.
        _, positions = stratified_split(split.labels, (count - 1e-6) / len(split), generator)
        chosen[name] = split[positions]
    return replace(data, **chosen)


def markdown(config: CompareConfig, data: ImageData, dense: float, rows: Sequence[Mapping[str, Any]]) -> str:
    """The results as a table, with the schedule above it. dense: test accuracy of the start, 0..1."""
    half_width = 100 * 1.96 * (dense * (1 - dense) / len(data.test)) ** 0.5
    lines = [
        f"ResNet-{config.depth}, {len(data.train):,} training images, {len(data.validation):,} for "
        f"validation, all {len(data.test):,} test images of {data.name}; batch {config.batch_size}; "
        f"dense {config.dense_epochs} epochs, then {config.learn_epochs} epochs of learning (lambda "
        f"{config.regularize:g}, logits at {config.group_lr:g}) and {config.finetune_epochs} of finetuning "
        f"in one cosine; G = {config.groups}. One dense network for all: {100 * dense:.2f} % "
        f"(95 % interval of one accuracy: +-{half_width:.1f}).",
        "",
        "| variant | seed | pruned FLOPs | pruned params | just pruned | finetuned | s/epoch learning |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {VARIANTS[row['variant']].label} | {row['seed']} | {row['pruned_flops']:.1f} % "
        f"| {row['pruned_params']:.1f} % | {100 * row['just_pruned']:.2f} % | {100 * row['accuracy']:.2f} % "
        f"| {row['learn_seconds'] / config.learn_epochs:.0f} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


def _once(folder: Path, run: Callable[..., RecipeResult], progress: Progress | None) -> dict[str, Any]:
    """Weights and summary of a stage: read where it is done, else run, from its last checkpoint if any."""
    if not (folder / SUMMARY).is_file():
        resume = any((folder / name).is_file() for name in (LAST, PREVIOUS))
        run(directory=folder, resume=resume, progress=progress)
    weights, _ = load_weights(folder / MODEL)
    with (folder / METRICS).open(encoding="utf-8") as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    return {**json.loads((folder / SUMMARY).read_text()), "weights": weights, "seconds": seconds}


def _fixed_groups(variant: Variant, config: CompareConfig, data: ImageData, seed: int) -> dict[str, Tensor]:
    """Logits [G, O] of every layer that no noise and no learning can change; none for learned groups."""
    if variant.groups not in ("contiguous", "random"):
        return {}
    generator = torch.Generator().manual_seed(seed)
    model = cifar_resnet(config.depth, data.num_classes, data.channels)
    logits = {}
    for layer in select_layers(model, data.example()):
        groups = torch.arange(layer.out_channels) * config.groups // layer.out_channels
        if variant.groups == "random":
            groups = groups[torch.randperm(len(groups), generator=generator)]
        one_hot = torch.nn.functional.one_hot(groups, config.groups).T
        logits[f"{layer.name}.group"] = one_hot.float() * _FIXED_LOGIT
    return logits


def _row(name: str, seed: int, learned: Mapping[str, Any], pruned: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "variant": name,
        "seed": seed,
        "pruned_flops": pruned["pruned_flops"],
        "pruned_params": pruned["pruned_params"],
        "learned": learned["test"]["accuracy"],
        "just_pruned": pruned["accuracy_before_finetuning"],
        "accuracy": pruned["test"]["accuracy"],
        "validation": pruned["validation"]["accuracy"],
        "learn_seconds": learned["seconds"],
        "finetune_seconds": pruned["seconds"],
    }


def _write(
    directory: Path,
    config: CompareConfig,
    data: ImageData,
    dense: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> None:
    accuracy = dense["test"]["accuracy"]
    content = {"config": asdict(config), "data": data.name, "dense": accuracy, "rows": list(rows)}
    write_text(directory / RESULTS, json.dumps(content, indent=2) + "\n")
    write_text(directory / TABLE, markdown(config, data, accuracy, rows))


def _check_settings(config: CompareConfig, directory: Path) -> None:
    """More seeds may be asked for later; everything else must stay."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("seeds", "device")}
    path = directory / SETTINGS
    if path.is_file() and (found := json.loads(path.read_text())) != settings:
        other = {name: found.get(name) for name, value in settings.items() if found.get(name) != value}
        raise DSPTrainingError(f"{directory} holds a comparison with other settings: {other}")
    write_text(path, json.dumps(settings, indent=2) + "\n")


@contextmanager
def _bars() -> Iterator[Callable[[str], Progress]]:
    from tqdm import tqdm

    with tqdm(unit="step", mininterval=10) as bar:

        def stage(name: str) -> Progress:
            def progress(done: int, total: int, text: str) -> None:
                bar.total, bar.n = total, done
                bar.set_description(f"{name}: {text}", refresh=False)
                bar.update(0)

            return progress

        yield stage


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare on ``cifar10_jpeg.npz`` and print the table."""
    default = CompareConfig()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-root", type=Path, required=True, help="folder of cifar10_jpeg.npz")
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and results")
    for name, value in asdict(default).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    given = vars(parser.parse_args(arguments))
    root, out = given.pop("data_root"), given.pop("out")
    config = CompareConfig(**given)
    data = few_images(load_cifar10_jpeg(root / "cifar10_jpeg.npz"), config.train_images)
    with _bars() as stage:
        compare(data, config, out, stage)
    print((out / TABLE).read_text())


if __name__ == "__main__":
    main()
