"""The whole way on real images in a minute or two: train, learn groups, prune, pack, fuse, save, reload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import dsp_kernels
from dsp_pruning.data import ImageData, load_digits, normalise
from dsp_pruning.models.cifar import cifar_resnet
from dsp_pruning.packing.pack import pack
from dsp_pruning.recipes.checkpoint import load_weights
from dsp_pruning.recipes.finetune import FinetuneConfig, finetune
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig, learn_groups
from dsp_pruning.recipes.pretrain import PretrainConfig, pretrain
from dsp_pruning.recipes.run import RecipeResult
from dsp_pruning.recipes.training import Progress, evaluate
from dsp_pruning.report import network_cost

__all__ = ["PACKED", "DemoConfig", "DemoResult", "run_demo"]

PACKED = "packed.safetensors"

# Makes the progress callback of a stage from its name.
StageProgress = Callable[[str], Progress]


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Settings for 1,123 training digits, where the published schedules would be far too long.

    epochs: of pretraining and of finetuning; group learning takes half. Tried on digits with three seeds.
    """

    seed: int = 0
    depth: int = 20
    epochs: int = 40
    batch_size: int = 64
    groups: int = 4
    prune: float = 0.5
    device: str = "cpu"

    def pretraining(self) -> PretrainConfig:
        """Stage 1."""
        return PretrainConfig(
            depth=self.depth,
            epochs=self.epochs,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
        )

    def learning(self) -> LearnGroupsConfig:
        """Stage 2."""
        return LearnGroupsConfig(
            depth=self.depth,
            epochs=(self.epochs + 1) // 2,
            batch_size=self.batch_size,
            groups=self.groups,
            seed=self.seed,
            device=self.device,
        )

    def finetuning(self) -> FinetuneConfig:
        """Stage 3: one cosine, because five would be eight epochs each."""
        return FinetuneConfig(
            depth=self.depth,
            epochs=self.epochs,
            batch_size=self.batch_size,
            lr=0.05,
            groups=self.groups,
            prune=self.prune,
            cycles=1,
            seed=self.seed,
            device=self.device,
        )


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    accuracy: of every stage on the test split, 0..1, in order. dense, masked, packed, fused: the networks in
    eval mode; packed is the one that was saved and loaded again.
    pruned: percent of ``flops`` and ``params``, of the grouped layers (the published way of counting) and of
    the whole network.
    packed_difference, fused_difference: largest difference of a logit on the test split, packed against
    masked and fused against packed.
    """

    data: ImageData
    accuracy: dict[str, float]
    dense: nn.Module
    masked: nn.Module
    packed: nn.Module
    fused: nn.Module
    pruned: dict[str, dict[str, float]]
    packed_difference: float
    fused_difference: float
    path: Path


def run_demo(
    directory: Path, config: DemoConfig | None = None, progress: StageProgress | None = None
) -> DemoResult:
    """Run every stage on scikit-learn's digits.

    directory: gets the runs of the three trainings and ``packed.safetensors``.
    Raises what the stages raise: DSPTrainingError, DSPPruningError, DSPVerificationError.
    """
    config = config or DemoConfig()
    data = load_digits(config.seed)

    def shown(stage: str) -> Progress | None:
        return None if progress is None else progress(stage)

    first = pretrain(data, config.pretraining(), directory / "pretrain", progress=shown("pretrain"))
    learned = learn_groups(
        data,
        _weights(first),
        config.learning(),
        directory / "learn_groups",
        source=first.path or "",
        progress=shown("learn groups"),
    )
    pruned = finetune(
        data,
        _weights(learned),
        config.finetuning(),
        directory / "finetune",
        source=learned.path or "",
        progress=shown("prune and finetune"),
    )
    return _measure(data, config, directory, first, learned, pruned)


def _measure(
    data: ImageData,
    config: DemoConfig,
    directory: Path,
    first: RecipeResult,
    learned: RecipeResult,
    pruned: RecipeResult,
) -> DemoResult:
    example = data.example()
    dense = cifar_resnet(config.depth, data.num_classes, data.channels)
    dense.load_state_dict(_weights(first))
    dense.eval()
    masked = pruned.model.cpu().eval()
    dsp_kernels.save(pack(masked, example), directory / PACKED)
    packed = dsp_kernels.load(directory / PACKED).eval()
    fused = dsp_kernels.fuse(packed, example)
    logits = {name: _logits(model, data) for name, model in (("m", masked), ("p", packed), ("f", fused))}
    before, after = network_cost(dense, example), network_cost(packed, example)
    return DemoResult(
        data=data,
        accuracy={
            "dense": first.test.accuracy,
            "groups learned": learned.test.accuracy,
            "before finetuning": pruned.extra["accuracy_before_finetuning"],
            "finetuned": pruned.test.accuracy,
            "packed, reloaded": evaluate(packed, data, data.test).accuracy,
            "fused": evaluate(fused, data, data.test).accuracy,
        },
        dense=dense,
        masked=masked,
        packed=packed,
        fused=fused,
        pruned={
            "grouped layers": {
                "flops": pruned.extra["pruned_flops"],
                "params": pruned.extra["pruned_params"],
            },
            "whole network": {
                "flops": 100 * (1 - after.macs / before.macs),
                "params": 100 * (1 - after.params / before.params),
            },
        },
        packed_difference=float((logits["p"] - logits["m"]).abs().max()),
        fused_difference=float((logits["f"] - logits["p"]).abs().max()),
        path=directory / PACKED,
    )


def _weights(result: RecipeResult) -> dict[str, Tensor]:
    if result.path is not None:
        return load_weights(result.path)[0]
    return {name: value.detach().cpu() for name, value in result.model.state_dict().items()}


@torch.inference_mode()
def _logits(model: nn.Module, data: ImageData) -> Tensor:
    return model(normalise(data.test.images, data.mean, data.std))
