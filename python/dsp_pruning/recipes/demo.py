"""The whole pipeline on scikit-learn's digits: train, learn groups, prune, pack, save, load, fuse."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

import dsp_kernels
from dsp_pruning.data import ImageData, load_digits, normalise
from dsp_pruning.packing.pack import pack
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain
from dsp_pruning.recipes.training import Progress, evaluate
from dsp_pruning.report import network_cost

PACKED = "packed.safetensors"


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings for 1,123 training images, chosen on digits with three seeds.

    epochs: of pretraining and of finetuning; group learning takes half.
    """

    seed: int = 0
    depth: int = 20
    epochs: int = 20
    batch_size: int = 64
    groups: int = 4
    prune: float = 0.5
    device: str = "cpu"


@dataclass(frozen=True)
class DemoResult:
    """Networks in eval mode and what was measured on them.

    dense: before pruning. packed: after it was saved to path and loaded again.
    accuracy: stage -> accuracy on the test split, 0..1.
    pruned: ``grouped layers`` (as in the paper) and ``whole network`` -> percent of ``flops`` and ``params``.
    packed_difference, fused_difference: largest difference of a logit on the test split, packed against
        masked and fused against packed.
    """

    data: ImageData
    accuracy: dict[str, float]
    dense: nn.Module
    packed: nn.Module
    pruned: dict[str, dict[str, float]]
    packed_difference: float
    fused_difference: float
    path: Path


def run_demo(
    directory: Path, config: DemoConfig, progress: Callable[[str], Progress | None] = lambda stage: None
) -> DemoResult:
    """Run every stage.

    directory: gets the files of the three trainings and ``packed.safetensors``.
    progress: stage name -> progress callback.
    Raises the errors of the stages: DSPTrainingError, DSPPruningError, DSPVerificationError.
    """
    data = load_digits(config.seed)
    common = asdict(config)
    epochs, groups, prune = (common.pop(name) for name in ("epochs", "groups", "prune"))
    training = PretrainConfig(**common, epochs=epochs)
    trained = pretrain(data, training, directory / "pretrain", progress=progress("pretrain"))
    learning = LearnGroupsConfig(**common, groups=groups, epochs=(epochs + 1) // 2)
    weights, bar = trained.model.state_dict(), progress("learn groups")
    learned = learn_groups(data, weights, learning, directory / "learn_groups", progress=bar)
    # One cosine cycle: five would be four epochs each.
    pruning = FinetuneConfig(**common, groups=groups, epochs=epochs, lr=0.05, prune=prune, cycles=1)
    weights, bar = learned.model.state_dict(), progress("prune and finetune")
    pruned = finetune(data, weights, pruning, directory / "finetune", progress=bar)
    example = data.example()
    dense, masked = trained.model.cpu().eval(), pruned.model.cpu().eval()
    dsp_kernels.save(pack(masked, example), directory / PACKED)
    packed = dsp_kernels.load(directory / PACKED).eval()
    fused = dsp_kernels.fuse(packed, example)
    images = normalise(data.test.images, data.mean, data.std)
    with torch.inference_mode():
        of_masked, of_packed, of_fused = (model(images) for model in (masked, packed, fused))
    before, after = network_cost(dense, example), network_cost(packed, example)
    whole = {"flops": after.macs / before.macs, "params": after.params / before.params}  # what is left
    return DemoResult(
        data=data,
        accuracy={
            "dense": trained.test.accuracy,
            "groups learned": learned.test.accuracy,
            "before finetuning": pruned.extra["accuracy_before_finetuning"],
            "finetuned": pruned.test.accuracy,
            "packed, reloaded": evaluate(packed, data, data.test).accuracy,
            "fused": evaluate(fused, data, data.test).accuracy,
        },
        dense=dense,
        packed=packed,
        pruned={
            "grouped layers": {what: pruned.extra[f"pruned_{what}"] for what in ("flops", "params")},
            "whole network": {what: 100 * (1 - left) for what, left in whole.items()},
        },
        packed_difference=float((of_packed - of_masked).abs().max()),
        fused_difference=float((of_fused - of_packed).abs().max()),
        path=directory / PACKED,
    )
