"""``dsp pack``: pack a pruned network into a file."""

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
from dsp_pruning.recipes.run import trained_image_size
from dsp_pruning.report import network_cost

_DEFAULT_SIZE = 32  # of images, without a summary beside the weights


def pack(
    ckpt: Annotated[Path, typer.Option("--ckpt", help="Weights written by dsp finetune.")],
    save: Annotated[Path, typer.Option("--save", help="File to write (.safetensors).")],
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size", min=1, help="Image size in pixels. Default: that of the training images."
        ),
    ] = None,
    fixed_size: Annotated[
        bool,
        typer.Option("--fixed-size", help="Fold more, for images of exactly this size."),
    ] = False,
) -> None:
    """Pack a pruned network exactly; the result is compared with it before it is saved."""
    check_packed_name(save)
    size = (image_size, image_size) if image_size else trained_image_size(ckpt) or (_DEFAULT_SIZE,) * 2
    model = load_pruned(ckpt, size)
    channels = next(model.parameters()).shape[1]
    example = torch.zeros(1, channels, *size)
    packed = packing.pack(model, example, fixed_size)
    dsp_kernels.save(packed, save, example)
    before, after = network_cost(model, example), network_cost(packed, example)
    console.print(
        f"{save}: {100 * (1 - after.macs / before.macs):.2f} % of the multiply-adds and "
        f"{100 * (1 - after.params / before.params):.2f} % of the parameters of the whole network removed; "
        f"for images of {size[0]}x{size[1]}",
        soft_wrap=True,
    )
