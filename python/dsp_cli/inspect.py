"""``dsp inspect``: what a packed network consists of."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import dsp_kernels
from dsp_cli.show import console, table
from dsp_cli.twin import example_of
from dsp_pruning.packing.twin import dense_twin
from dsp_pruning.report import draw_overview, draw_structures, layer_rows, network_cost


def inspect(
    file: Annotated[Path, typer.Argument(help="A packed network.")],
    picture: Annotated[Path | None, typer.Option("--picture", help="Draw every layer's groups here.")] = None,
    overview: Annotated[
        Path | None, typer.Option("--overview", help="Draw the multiply-adds kept in every layer here.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=1, help="Height and width, if not the file's own.")
    ] = None,
) -> None:
    """Show groups, channels, filters and multiply-adds of every packed layer."""
    model = dsp_kernels.load(file)
    dense = dense_twin(model) if getattr(model, "dense_widths", None) else None
    example, known = example_of(model, image_size)
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
    size = f"{example[0].shape[2]} x {example[0].shape[3]}"
    shown = table(f"{file}, images of {size}", columns, cells)
    shown.columns[0].overflow = "fold"  # long names are told apart by their ends
    console.print(shown)
    if not known:
        console.print(f"the file does not say how large its images are; {size} is one size that fits")
    kept = sum(row.macs for row in rows) / max(sum(row.dense_macs for row in rows), 1)
    console.print(f"packed layers: {100 * kept:.2f} % of the multiply-adds kept")
    cost = network_cost(model, example)
    if dense is not None:
        whole = network_cost(dense, example)
        console.print(
            f"whole network: {cost.macs:,} multiply-adds ({100 * cost.macs / whole.macs:.2f} % kept), "
            f"{cost.params:,} parameters ({100 * cost.params / whole.params:.2f} % kept)"
        )
    else:
        console.print(
            f"whole network: {cost.macs:,} multiply-adds, {cost.params:,} parameters; the file does not hold "
            "the widths before packing, so the share kept is relative to the widths of the packed layers"
        )
    if picture is not None:
        console.print(f"picture: {draw_structures(model, picture, title=str(file))}", soft_wrap=True)
    if overview is not None:
        console.print(f"overview: {draw_overview(rows, overview, title=str(file))}", soft_wrap=True)
