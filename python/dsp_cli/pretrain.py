"""``dsp pretrain``: train the dense network."""

from __future__ import annotations

from dsp_cli import options as o
from dsp_cli.show import print_result
from dsp_pruning.recipes import pretrain as recipe
from dsp_pruning.recipes.pretrain import PretrainConfig


@o.run_command(PretrainConfig)
def pretrain(flags: o.RunFlags) -> None:
    """Train a dense ResNet."""
    with o.training("pretrain") as progress:
        result = recipe.pretrain(
            flags.images(),
            flags.config(PretrainConfig),
            flags.folder / "pretrain",
            resume=flags.resume,
            progress=progress,
        )
    if result.main:
        print_result(result)
