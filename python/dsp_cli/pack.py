"""``dsp pack``: a pruned network in, a file with the packed one out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import dsp_kernels
from dsp_cli.options import check_packed_name
from dsp_cli.show import console
from dsp_pruning.packing import pack as packing
from dsp_pruning.recipes.finetune import load_pruned
from dsp_pruning.recipes.run import image_size_beside
from dsp_pruning.report import network_cost

_USUAL = 32  # where nothing lies beside the weights


def pack(
    ckpt: Annotated[Path, typer.Option("--ckpt", help="A network that dsp finetune wrote.")],
    save: Annotated[Path, typer.Option("--save", help="Where the packed network goes (.safetensors).")],
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", min=1, help="Height and width of an image, if not as in its training."),
    ] = None,
    fixed_size: Annotated[
        bool,
        typer.Option("--fixed-size", help="Fold more, for images of this one size; others are refused then."),
    ] = False,
) -> None:
    """Pack a pruned network exactly; the result is checked against it before it is saved."""
    check_packed_name(save)
    trained_on = image_size_beside(ckpt) or (_USUAL, _USUAL)
    size = trained_on if image_size is None else (image_size, image_size)
    model = load_pruned(ckpt, size)
    channels = next(model.parameters()).shape[1]
    example = torch.zeros(1, channels, *size)
    packed = packing.pack(model, example, fixed_size)
    dsp_kernels.save(packed, save, example)
    before, after = network_cost(model, example), network_cost(packed, example)
    console.print(
        f"{save}: {100 * (1 - after.macs / before.macs):.2f} % of the multiply-adds and "
        f"{100 * (1 - after.params / before.params):.2f} % of the parameters of the whole network are gone; "
        f"for images of {size[0]}x{size[1]}",
        soft_wrap=True,
    )
