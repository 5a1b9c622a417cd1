"""``dsp learn-groups``: learn which filters of a trained network form a group."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from dsp_cli import options as o
from dsp_cli.show import print_result
from dsp_pruning.recipes import learn_groups as recipe
from dsp_pruning.recipes.learn_groups import LearnGroupsConfig


class Order(StrEnum):
    """The ways that GroupWrapper knows."""

    exact = "exact"
    none = "none"
    original = "original"


@o.run_command(LearnGroupsConfig)
def learn_groups(
    flags: o.RunFlags,
    groups: o.Groups = LearnGroupsConfig.groups,
    layer_groups: o.LayerGroups = None,
    regularize: Annotated[
        float, typer.Option("--regularize", "-r", help="Strength of the regulariser.")
    ] = LearnGroupsConfig.regularize,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of the soft groups.")
    ] = LearnGroupsConfig.temperature,
    ckpt: o.Checkpoint = None,
    second_order: Annotated[
        Order, typer.Option("--second-order", help="How the logits see that the weights follow them.")
    ] = Order.exact,
) -> None:
    """Learn the groups of every layer, from a trained dense network."""
    by_layer = o.layer_groups(layer_groups)
    weights, source = o.stage_weights(flags, ckpt, "pretrain", f"pretrain {flags.network}")
    config = flags.config(
        LearnGroupsConfig,
        groups=groups,
        layer_groups=by_layer,
        regularize=regularize,
        temperature=temperature,
        second_order=second_order.value,
    )
    with o.training("learn groups") as progress:
        result = recipe.learn_groups(
            flags.images(),
            weights,
            config,
            flags.folder / f"learn_groups_{o.groups_folder(groups, by_layer)}",
            source=source,
            resume=flags.resume,
            progress=progress,
        )
    if result.main:
        print_result(result)
