"""``dsp finetune``: prune a network with learned groups and train what is left."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from dsp_cli import options as o
from dsp_cli.show import console, print_result
from dsp_pruning.distributed import is_main, process_group
from dsp_pruning.recipes import finetune as recipe
from dsp_pruning.recipes.finetune import FinetuneConfig


class TargetName(StrEnum):
    """What a rate is a share of, see PruneWrapper."""

    macs = "macs"
    params = "params"


@o.run_command(FinetuneConfig)
def finetune(
    flags: o.RunFlags,
    groups: o.Groups = FinetuneConfig.groups,
    layer_groups: o.LayerGroups = None,
    prune: Annotated[
        float, typer.Option("--prune", "-p", help="Share of the grouped layers' cost to remove, 0..1.")
    ] = FinetuneConfig.prune,
    target: Annotated[
        TargetName, typer.Option("--target", help="That cost: multiply-adds or parameters.")
    ] = TargetName.macs,
    channel_multiple: Annotated[
        int, typer.Option("--channel-multiple", min=1, help="Groups keep multiples of so many channels.")
    ] = FinetuneConfig.channel_multiple,
    fp_every_nth_conv: Annotated[
        int,
        typer.Option("--fp-every-nth-conv", help="These also lose filters: 2, bottlenecks 3, -1 none."),
    ] = FinetuneConfig.fp_every_nth_conv,
    cycles: Annotated[
        int, typer.Option("--cycles", min=1, help="Cosine cycles; each starts by pruning a little more.")
    ] = FinetuneConfig.cycles,
    one_shot: Annotated[bool, typer.Option("--one-shot", help="Prune all in the first cycle.")] = False,
    ckpt: o.Checkpoint = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the reachable rates and what would be kept; no more.")
    ] = False,
) -> None:
    """Prune a group-learned network to a rate and finetune it."""
    by_layer = o.layer_groups(layer_groups)
    named = o.groups_folder(groups, by_layer)
    before = f"learn-groups {flags.network} -g {groups}"
    before += "".join(f" --layer-groups '{pattern}={count}'" for pattern, count in by_layer.items())
    weights, source = o.stage_weights(flags, ckpt, f"learn_groups_{named}", before)
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
    if dry_run:
        with process_group():
            if is_main():
                (low, high), report = recipe.preview(flags.images(), weights, config, source=source)
                console.print(f"rates within reach, of {target.value}: {low:.4f} to {high:.4f}")
                kept = f"{prune} is out of reach" if report is None else str(report)
                console.print(kept, soft_wrap=True, markup=False)
        return
    with o.training("finetune") as progress:
        result = recipe.finetune(
            flags.images(),
            weights,
            config,
            flags.folder / f"finetune_{named}_p{prune:g}",
            source=source,
            resume=flags.resume,
            progress=progress,
        )
    if result.main:
        print_result(result)
