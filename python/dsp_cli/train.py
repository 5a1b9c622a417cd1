"""``dsp pretrain``, ``dsp learn-groups`` and ``dsp finetune``; each starts from the previous one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from enum import StrEnum
from functools import partial
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

SecondOrder = StrEnum("SecondOrder", "exact none original")
Target = StrEnum("Target", "macs params")

LayerGroups = Annotated[
    list[str] | None,
    typer.Option(
        "--layer-groups",
        metavar="PATTERN=G",
        help="Another number of groups for layers whose name matches, such as 'stage_3.*=8'; repeatable.",
    ),
]
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
def pretrain(flags: o.RunFlags) -> None:
    """Train a dense ResNet."""
    config = flags.config(PretrainConfig)
    flags.train("pretrain", "pretrain", partial(pretraining.pretrain, config=config))


@o.run_command(LearnGroupsConfig)
def learn_groups(
    flags: o.RunFlags,
    groups: o.Groups = LearnGroupsConfig.groups,
    layer_groups: LayerGroups = None,
    regularize: Annotated[
        float, typer.Option("--regularize", "-r", help="Strength of the regulariser (lambda of the paper).")
    ] = LearnGroupsConfig.regularize,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of the Gumbel softmax.")
    ] = LearnGroupsConfig.temperature,
    ckpt: Checkpoint = None,
    second_order: Annotated[
        SecondOrder, typer.Option("--second-order", help="Second-order term of the gradient of the logits.")
    ] = SecondOrder.exact,
) -> None:
    """Learn the groups of every layer, from a trained dense network."""
    by_layer = _by_layer(layer_groups)
    weights, source = _stage_weights(flags, ckpt, "pretrain", f"pretrain {flags.network}")
    config = flags.config(
        LearnGroupsConfig,
        groups=groups,
        layer_groups=by_layer,
        regularize=regularize,
        temperature=temperature,
        second_order=second_order.value,
    )
    recipe = partial(learning.learn_groups, weights=weights, config=config, source=source)
    flags.train("learn groups", f"learn_groups_{groups_folder(groups, by_layer)}", recipe)


@o.run_command(FinetuneConfig)
def finetune(
    flags: o.RunFlags,
    groups: o.Groups = FinetuneConfig.groups,
    layer_groups: LayerGroups = None,
    prune: Annotated[
        float, typer.Option("--prune", "-p", help="Share of the grouped layers' cost to remove, 0..1.")
    ] = FinetuneConfig.prune,
    target: Annotated[
        Target, typer.Option("--target", help="That cost: multiply-adds or parameters.")
    ] = Target.macs,
    channel_multiple: Annotated[
        int,
        typer.Option("--channel-multiple", min=1, help="Keep a multiple of this many channels per group."),
    ] = FinetuneConfig.channel_multiple,
    fp_every_nth_conv: Annotated[
        int,
        typer.Option(
            "--fp-every-nth-conv", help="Also prune filters of every nth layer: 2, bottlenecks 3, none -1."
        ),
    ] = FinetuneConfig.fp_every_nth_conv,
    cycles: Annotated[
        int, typer.Option("--cycles", min=1, help="Cosine cycles; each starts by pruning a little more.")
    ] = FinetuneConfig.cycles,
    one_shot: Annotated[bool, typer.Option("--one-shot", help="Prune all in the first cycle.")] = False,
    ckpt: Checkpoint = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the reachable rates and what would be kept.")
    ] = False,
) -> None:
    """Prune a network with learned groups and finetune it."""
    by_layer = _by_layer(layer_groups)
    named = groups_folder(groups, by_layer)
    command = f"learn-groups {flags.network} -g {groups}"
    command += "".join(f" --layer-groups '{pattern}={count}'" for pattern, count in by_layer.items())
    weights, source = _stage_weights(flags, ckpt, f"learn_groups_{named}", command)
    config = flags.config(
        FinetuneConfig,
        groups=groups,
        layer_groups=by_layer,
        prune=prune,
        target=target.value,
        channel_multiple=channel_multiple,
        fp_every_nth_conv=fp_every_nth_conv,
        cycles=cycles,
        one_shot=one_shot,
    )
    if not dry_run:
        recipe = partial(finetuning.finetune, weights=weights, config=config, source=source)
        flags.train("finetune", f"finetune_{named}_p{prune:g}", recipe)
        return
    with process_group():
        if is_main():
            (low, high), report = finetuning.preview(flags.images(), weights, config, source=source)
            console.print(f"reachable rates, share of {target.value}: {low:.4f} to {high:.4f}")
            kept = f"{prune} is unreachable" if report is None else str(report)
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


def _by_layer(given: Sequence[str] | None) -> dict[str, int]:
    """Pattern -> G of every ``--layer-groups``."""
    found = {}
    for text in given or ():
        pattern, _, count = text.rpartition("=")
        if not pattern or not count.isdecimal():
            raise DSPPruningError(f"--layer-groups is {text!r}; expected PATTERN=G such as 'stage_3.*=8'")
        found[pattern] = int(count)
    return found


def _stage_weights(
    flags: o.RunFlags, ckpt: Path | None, stage: str, command: str
) -> tuple[dict[str, Any], str | Path]:
    """Weights to start from, and their source: ``--ckpt``, or what the previous stage, ``command``, wrote."""
    if str(ckpt) == "torchvision":
        return published_weights(flags.arch.value), f"torchvision's weights of {flags.arch.value}"
    path = ckpt or flags.folder / stage / MODEL
    if ckpt is None and not path.is_file():
        unfinished = path.with_name(LAST)
        also = f" (or --ckpt {unfinished}, which is unfinished)" if unfinished.is_file() else ""
        raise DSPPruningError(f"no {path}: run `dsp {command}` first, or pass --ckpt{also}")
    return load_weights(path)[0], path
