"""Recipe 3: prune a network with learned groups to a rate, then train what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dsp_kernels.errors import DSPFormatError
from dsp_pruning.data import ImageData
from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.pruning import PruneWrapper
from dsp_pruning.recipes.checkpoint import load_weights, restore_weights
from dsp_pruning.recipes.run import RecipeResult, RunConfig, conclude, depth_of, new_model, pick_device
from dsp_pruning.recipes.schedules import cosine
from dsp_pruning.recipes.training import Hook, Progress, Trainer, evaluate

__all__ = ["FinetuneConfig", "finetune", "load_pruned"]


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(RunConfig):
    """The published settings of CIFAR-10: five cosine cycles.

    groups: G of every layer, as learned. prune: share of the grouped layers' FLOPs to remove, 0..1.
    fp_every_nth_conv: which grouped layers also lose whole filters; 2 is the last conv of each block.
    prune_channels: False prunes whole filters only.
    """

    epochs: int = 400
    lr: float = 0.015
    weight_decay: float = 1e-3
    groups: int = 4
    prune: float = 0.5
    fp_every_nth_conv: int = 2
    prune_channels: bool = True
    cycles: int = 5


class _PruneHook(Hook):
    def __init__(self, pruner: PruneWrapper) -> None:
        self.pruner = pruner

    def after_step(self, images: Tensor, labels: Tensor) -> None:
        self.pruner.after_step()


def finetune(
    data: ImageData,
    weights: Mapping[str, Tensor],
    config: FinetuneConfig | None = None,
    directory: Path | None = None,
    *,
    source: str | Path = "the given weights",
    resume: bool = False,
    progress: Progress | None = None,
) -> RecipeResult:
    """Prune once, finetune, and keep the epoch that does best on the validation split.

    weights: state dict with ``<conv>.group``; ``source`` is what an error calls it.
    directory, resume: as in ``pretrain``.
    The result's ``extra`` holds ``pruned_flops`` and ``pruned_params`` (percent of the grouped layers) and
    ``accuracy_before_finetuning`` on the test split, 0..1.
    Raises DSPPruningError for a rate that cannot be reached, DSPTrainingError for a loss that is not finite.
    """
    config = config or FinetuneConfig()
    device = pick_device(config.device)
    data = data.to(device)
    model = new_model(config, data, device)
    pruner = PruneWrapper(
        model,
        config.groups,
        fp_every_nth_conv=config.fp_every_nth_conv,
        example_input=data.example().to(device),
        prune_channels=config.prune_channels,
    )
    restore_weights(model, weights, source, optional=(".mask",))
    pruned_flops, pruned_params = pruner.initialize(config.prune)
    just_pruned = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = Trainer(
        model,
        torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        ),
        data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        schedule=cosine(config.epochs, cycles=config.cycles),
        generator=torch.Generator().manual_seed(config.seed),
        hook=_PruneHook(pruner),
        directory=directory,
        config=config.settings(data),
    )
    if resume:
        trainer.resume()
    trainer.run(progress)
    model.load_state_dict(just_pruned)
    before = evaluate(model, data, data.test)
    trainer.load_best()
    extra = {
        "pruned_flops": pruned_flops,
        "pruned_params": pruned_params,
        "accuracy_before_finetuning": before.accuracy,
    }
    return conclude("finetune", trainer, extra)


def load_pruned(path: str | Path, image_hw: tuple[int, int] = (32, 32)) -> nn.Module:
    """The masked dense network in a file that ``finetune`` wrote, in eval mode, ready to be packed.

    image_hw: height and width of one image.
    Raises DSPFormatError for a file that holds no pruned CIFAR ResNet.
    """
    weights, _ = load_weights(path)
    depth = depth_of(weights, path)
    logits = [value for name, value in weights.items() if name.endswith(".group")]
    if not logits or not any(name.endswith(".mask") for name in weights):
        raise DSPFormatError(f"{path} holds no group logits and masks: it must be a pruned network")
    classes, channels = weights["classifier.weight"].shape[0], weights["conv_1_3x3.weight"].shape[1]
    model = cifar_resnet(depth, classes, channels)
    PruneWrapper(
        model, len(logits[0]), fp_layer_indices=[], example_input=torch.zeros(1, channels, *image_hw)
    )
    restore_weights(model, weights, path)
    return model.eval()
