"""``dsp inspect``: what a packed network consists of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import dsp_kernels
from dsp_cli import options as o
from dsp_cli.show import console, table
from dsp_cli.twin import dense_twin, input_channels
from dsp_pruning.report import draw_structures, layer_rows, network_cost


def inspect(
    file: Annotated[Path, typer.Argument(help="A packed network.")],
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw every layer's groups here.")] = None,
    image_size: o.ImageSize = 32,
) -> None:
    """Show groups, channels, filters and multiply-adds of every packed layer."""
    model = dsp_kernels.load(file)
    dense = dense_twin(model)
    example = torch.zeros(1, input_channels(model), image_size, image_size)
    rows = layer_rows(model, example, dense)
    columns = ("layer", "groups", "channels read", "filters", "MACs", "MACs kept")
    cells = [
        (
            row.name,
            row.groups,
            f"{row.channels_read} of {row.in_channels}",
            f"{row.filters} of {row.out_channels}",
            f"{row.macs:,}",
            f"{100 * row.kept:.1f} %",
        )
        for row in rows
    ]
    console.print(table(f"{file}, images of {image_size} x {image_size}", columns, cells))
    kept = sum(row.macs for row in rows) / sum(row.dense_macs for row in rows)
    console.print(f"packed layers: {100 * kept:.2f} % of the multiply-adds kept")
    cost, whole = network_cost(model, example), network_cost(dense, example)
    console.print(
        f"whole network: {cost.macs:,} multiply-adds ({100 * cost.macs / whole.macs:.2f} % kept), "
        f"{cost.params:,} parameters ({100 * cost.params / whole.params:.2f} % kept)"
    )
    if picture is not None:
        console.print(f"picture: {draw_structures(model, picture, title=str(file))}", soft_wrap=True)
