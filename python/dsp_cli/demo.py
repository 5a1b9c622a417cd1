"""``dsp demo``: the whole pipeline on real images, and a table of the results."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from dsp_benchmarks.report.results import Row, write_json
from rich.table import Table

from dsp_cli import options as o
from dsp_cli.bench import bench_model
from dsp_cli.show import console, progress_bars
from dsp_pruning.recipes.demo import DemoConfig, DemoResult, run_demo
from dsp_pruning.recipes.run import pick_device
from dsp_pruning.report import draw_structures

_BATCHES = (1, 32)


def demo(
    save_dir: Annotated[Path, typer.Option("--save-dir", help="Folder for the results.")] = Path("runs/demo"),
    epochs: Annotated[
        int,
        typer.Option("--epochs", min=1, help="Of pretraining and of finetuning; group learning takes half."),
    ] = DemoConfig.epochs,
    layers: o.Layers = DemoConfig.depth,
    groups: o.Groups = DemoConfig.groups,
    prune: Annotated[
        float, typer.Option("--prune", "-p", help="Share of the grouped layers' FLOPs to remove, 0..1.")
    ] = DemoConfig.prune,
    rounds: o.Rounds = 30,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
) -> None:
    """Train a ResNet on digits, learn groups, prune, pack, save, load, fuse and time it."""
    started = time.perf_counter()
    config = DemoConfig(seed=seed, depth=layers, epochs=epochs, groups=groups, prune=prune, device=device)
    with progress_bars() as bars:
        result = run_demo(save_dir, config, bars)
    image_size = result.data.image_hw[0]
    rows = bench_model(result.packed, result.dense, _BATCHES, image_size, rounds, seed, pick_device("cpu"))
    picture = draw_structures(result.packed, save_dir / "structure.png", f"ResNet-{config.depth}, digits")
    raw = write_json(save_dir / "latency.json", rows, net=f"resnet{config.depth}_digits")
    console.print(_table(result, config, rows))
    seconds = time.perf_counter() - started
    console.print(f"{result.path}, {picture}, {raw}; {seconds:.0f} s in total", soft_wrap=True)


def _table(result: DemoResult, config: DemoConfig, rows: list[Row]) -> Table:
    made = Table(title=f"ResNet-{config.depth} on digits, G = {config.groups}", title_justify="left")
    for column in ("quantity", "value", "measured on"):
        made.add_column(column, justify="right" if column == "value" else "left", no_wrap=True)
    images = f"{len(result.data.test)} test images"
    for stage, accuracy in result.accuracy.items():
        made.add_row(f"accuracy {stage}", f"{100 * accuracy:.2f} %", images)
    made.add_section()
    for convention, pruned in result.pruned.items():
        for what, percent in pruned.items():
            shown = "FLOPs" if what == "flops" else what
            made.add_row(f"pruned {shown}", f"{percent:.2f} %", convention)
    made.add_section()
    for name, difference in (
        ("packed vs masked", result.packed_difference),
        ("fused vs packed", result.fused_difference),
    ):
        made.add_row(name, f"{difference:.1e}", "largest logit difference")
    made.add_section()
    dense = {row.batch: row.samples.median for row in rows if row.engine == "dense"}
    threads = torch.get_num_threads()
    for row in rows:
        faster = dense[row.batch] / row.samples.median
        made.add_row(
            f"latency {row.engine}, batch {row.batch}",
            f"{1e3 * row.samples.median:.2f} ms",
            f"{faster:.2f}x as fast as dense, {threads} thread{'s' * (threads > 1)}",
        )
    return made
