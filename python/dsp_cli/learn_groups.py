"""``dsp learn-groups``: learn which filters of a trained network form a group."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from dsp_cli import options as o
from dsp_cli.show import print_result, progress_bars
from dsp_pruning import data as datasets
from dsp_pruning.recipes import learn_groups as recipe
from dsp_pruning.recipes.checkpoint import load_weights
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig


class Order(StrEnum):
    """The ways that GroupWrapper knows."""

    exact = "exact"
    none = "none"
    original = "original"


def learn_groups(
    layers: o.Layers = LearnGroupsConfig.depth,
    groups: o.Groups = LearnGroupsConfig.groups,
    regularize: Annotated[
        float, typer.Option("--regularize", "-r", help="Strength of the regulariser.")
    ] = LearnGroupsConfig.regularize,
    ckpt: o.Checkpoint = None,
    data: o.Data = o.DataName.digits,
    data_root: o.DataRoot = None,
    download: o.Download = False,
    save_dir: o.SaveDir = None,
    epochs: o.Epochs = LearnGroupsConfig.epochs,
    batch_size: o.BatchSize = LearnGroupsConfig.batch_size,
    lr: o.LearningRate = LearnGroupsConfig.lr,
    momentum: o.Momentum = LearnGroupsConfig.momentum,
    wd: o.WeightDecay = LearnGroupsConfig.weight_decay,
    second_order: Annotated[
        Order, typer.Option("--second-order", help="How the logits see that the weights follow them.")
    ] = Order.exact,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    resume: o.Resume = False,
) -> None:
    """Learn the groups of every layer, from a trained dense network."""
    folder = o.run_folder(save_dir, layers, data)
    source = o.stage_weights(ckpt, folder / "pretrain", f"pretrain -l {layers}")
    weights, _ = load_weights(source)
    config = LearnGroupsConfig(
        depth=layers,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        weight_decay=wd,
        seed=seed,
        device=device,
        groups=groups,
        regularize=regularize,
        second_order=second_order.value,
    )
    images = datasets.load(data.value, data_root, download=download, seed=seed)
    directory = folder / f"learn_groups_g{groups}"
    with progress_bars() as bars:
        result = recipe.learn_groups(
            images,
            weights,
            config,
            directory,
            source=source,
            resume=resume,
            progress=bars("learn groups"),
        )
    print_result(result)
