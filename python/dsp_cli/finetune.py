"""``dsp finetune``: prune a network with learned groups and train what is left."""

from __future__ import annotations

from typing import Annotated

import typer

from dsp_cli import options as o
from dsp_cli.show import print_result, progress_bars
from dsp_pruning import data as datasets
from dsp_pruning.recipes import finetune as recipe
from dsp_pruning.recipes.checkpoint import load_weights
from dsp_pruning.recipes.finetune import FinetuneConfig


def finetune(
    layers: o.Layers = FinetuneConfig.depth,
    groups: o.Groups = FinetuneConfig.groups,
    prune: Annotated[
        float, typer.Option("--prune", "-p", help="Share of the grouped layers' FLOPs to remove, 0..1.")
    ] = FinetuneConfig.prune,
    ckpt: o.Checkpoint = None,
    data: o.Data = o.DataName.digits,
    data_root: o.DataRoot = None,
    download: o.Download = False,
    save_dir: o.SaveDir = None,
    epochs: o.Epochs = FinetuneConfig.epochs,
    batch_size: o.BatchSize = FinetuneConfig.batch_size,
    lr: o.LearningRate = FinetuneConfig.lr,
    momentum: o.Momentum = FinetuneConfig.momentum,
    wd: o.WeightDecay = FinetuneConfig.weight_decay,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    resume: o.Resume = False,
) -> None:
    """Prune a group-learned network to a rate and finetune it."""
    folder = o.run_folder(save_dir, layers, data)
    learning = f"learn-groups -l {layers} -g {groups}"
    source = o.stage_weights(ckpt, folder / f"learn_groups_g{groups}", learning)
    weights, _ = load_weights(source)
    config = FinetuneConfig(
        depth=layers,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        weight_decay=wd,
        seed=seed,
        device=device,
        groups=groups,
        prune=prune,
    )
    images = datasets.load(data.value, data_root, download=download, seed=seed)
    directory = folder / f"finetune_g{groups}_p{prune:g}"
    with progress_bars() as bars:
        result = recipe.finetune(
            images, weights, config, directory, source=source, resume=resume, progress=bars("finetune")
        )
    print_result(result)
