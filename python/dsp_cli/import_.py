"""``dsp import``: a network published by the authors, as a packed network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import dsp_kernels
from dsp_cli.options import check_packed_name
from dsp_cli.show import console
from dsp_cli.twin import example_of
from dsp_kernels import PackedConv2d
from dsp_kernels.errors import DSPFormatError
from dsp_pruning.released.archive import is_torchscript
from dsp_pruning.released.load import load_released, verify_released


def import_network(
    file: Annotated[Path, typer.Argument(help="A TorchScript archive, a checkpoint or .npz arrays.")],
    out: Annotated[Path, typer.Argument(help="File to write (.safetensors).")],
    image_size: Annotated[
        int | None,
        typer.Option(
            "--image-size", min=1, help="Image size in pixels. Default: 32 for CIFAR, 224 for ImageNet."
        ),
    ] = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Also run the archive, which executes its code, and compare the outputs."
        ),
    ] = False,
) -> None:
    """Turn a published network into a packed one. The code of an archive is parsed, not run."""
    check_packed_name(out)
    network = load_released(file)
    (example, *_), _ = example_of(network, image_size)
    if verify:
        if not is_torchscript(file):
            raise DSPFormatError(
                f"--verify runs a TorchScript archive; {file} holds weights only, and packing a checkpoint "
                "compares by itself"
            )
        size = (example.shape[2], example.shape[3])
        difference = verify_released(file, network, size)
        console.print(f"the archive and the imported network differ by at most {difference:.2g}")
    dsp_kernels.save(network, out, torch.zeros_like(example))
    convs = [module for module in network.modules() if isinstance(module, PackedConv2d)]
    branches = sum(len(conv.structure.groups) for conv in convs)
    console.print(f"{out}: {len(convs)} packed layers of {branches} branches", soft_wrap=True)
