"""``dsp pretrain``: train the dense network."""

from __future__ import annotations

from dsp_cli import options as o
from dsp_cli.show import print_result, progress_bars
from dsp_pruning import data as datasets
from dsp_pruning.recipes import pretrain as recipe
from dsp_pruning.recipes.pretrain import PretrainConfig


def pretrain(
    layers: o.Layers = PretrainConfig.depth,
    data: o.Data = o.DataName.digits,
    data_root: o.DataRoot = None,
    download: o.Download = False,
    save_dir: o.SaveDir = None,
    epochs: o.Epochs = PretrainConfig.epochs,
    batch_size: o.BatchSize = PretrainConfig.batch_size,
    lr: o.LearningRate = PretrainConfig.lr,
    momentum: o.Momentum = PretrainConfig.momentum,
    wd: o.WeightDecay = PretrainConfig.weight_decay,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    resume: o.Resume = False,
) -> None:
    """Train a dense CIFAR ResNet."""
    config = PretrainConfig(
        depth=layers,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        weight_decay=wd,
        seed=seed,
        device=device,
    )
    images = datasets.load(data.value, data_root, download=download, seed=seed)
    directory = o.run_folder(save_dir, layers, data) / "pretrain"
    with progress_bars() as bars:
        result = recipe.pretrain(images, config, directory, resume=resume, progress=bars("pretrain"))
    print_result(result)
