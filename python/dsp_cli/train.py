"""``dsp pretrain``, ``dsp learn-groups`` and ``dsp finetune``; each starts from the previous one."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import typer

from dsp_cli import options as o
from dsp_cli.show import console
from dsp_kernels.errors import DSPPruningError
from dsp_pruning.distributed import is_main, process_group
from dsp_pruning.models.imagenet import published_weights
from dsp_pruning.recipes import finetune as finetuning
from dsp_pruning.recipes import learn_groups as learning
from dsp_pruning.recipes import pretrain as pretraining
from dsp_pruning.recipes.checkpoint import LAST, load_weights
from dsp_pruning.recipes.finetune import FinetuneConfig
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig
from dsp_pruning.recipes.pretrain import PretrainConfig
from dsp_pruning.recipes.run import MODEL

Checkpoint = Annotated[
    Path | None,
    typer.Option(
        "--ckpt",
        help="Weights to start from; `torchvision` downloads its ImageNet weights for --arch. "
        "Default: the previous stage in --save-dir.",
    ),
]

_LONGEST_LAYERS = 150  # characters in the name of a folder; file systems allow 255


@o.run_command(PretrainConfig)
def pretrain(flags: o.RunFlags[PretrainConfig]) -> None:
    """Train a dense ResNet."""
    flags.train("pretrain", "pretrain", pretraining.pretrain)


@o.run_command(LearnGroupsConfig)
def learn_groups(flags: o.RunFlags[LearnGroupsConfig], ckpt: Checkpoint = None) -> None:
    """Learn the groups of every layer, from a trained dense network."""
    weights, source = _stage_weights(flags, ckpt, "pretrain", f"pretrain {flags.network}")
    folder = f"learn_groups_{groups_folder(flags.config.groups, flags.config.layer_groups)}"
    flags.train("learn groups", folder, learning.learn_groups, weights=weights, source=source)


@o.run_command(FinetuneConfig)
def finetune(
    flags: o.RunFlags[FinetuneConfig],
    ckpt: Checkpoint = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the reachable rates and what would be kept.")
    ] = False,
) -> None:
    """Prune a network with learned groups and finetune it."""
    config = flags.config
    named = groups_folder(config.groups, config.layer_groups)
    command = f"learn-groups {flags.network} -g {config.groups}"
    command += "".join(f" --layer-groups '{pattern}={g}'" for pattern, g in config.layer_groups.items())
    weights, source = _stage_weights(flags, ckpt, f"learn_groups_{named}", command)
    if not dry_run:
        folder = f"finetune_{named}_p{config.prune:g}"
        flags.train("finetune", folder, finetuning.finetune, weights=weights, source=source)
        return
    with process_group():
        if is_main():
            (low, high), report = finetuning.preview(flags.images(), weights, config, source=source)
            console.print(f"reachable rates, share of {config.target}: {low:.4f} to {high:.4f}")
            kept = f"{config.prune} is unreachable" if report is None else str(report)
            console.print(kept, soft_wrap=True, markup=False)


def groups_folder(groups: int, by_layer: Mapping[str, int]) -> str:
    """Suffix of a stage's folder, different for different groups: ``g4``, ``g4_stage_3.%2A=8``.

    Patterns are percent-encoded, so "=" only precedes a number; a digest replaces patterns that are too long
    for the name of a folder.
    """
    layers = "".join(f"_{quote(pattern, safe='')}={count}" for pattern, count in by_layer.items())
    if len(layers) > _LONGEST_LAYERS:
        layers = f"_{hashlib.sha256(layers.encode()).hexdigest()[:32]}"
    return f"g{groups}{layers}"


def _stage_weights(
    flags: o.RunFlags[Any], ckpt: Path | None, stage: str, command: str
) -> tuple[dict[str, Any], str | Path]:
    """Weights to start from, and their source: ``--ckpt``, or what the previous stage, ``command``, wrote."""
    if str(ckpt) == "torchvision":
        arch = flags.config.arch
        return published_weights(arch), f"torchvision's weights of {arch}"
    path = ckpt or flags.folder / stage / MODEL
    if ckpt is None and not path.is_file():
        unfinished = path.with_name(LAST)
        also = f" (or --ckpt {unfinished}, which is unfinished)" if unfinished.is_file() else ""
        raise DSPPruningError(f"no {path}: run `dsp {command}` first, or pass --ckpt{also}")
    return load_weights(path)[0], path
