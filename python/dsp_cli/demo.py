"""``dsp demo``: the whole pipeline on real images, and a table of the results."""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from dsp_benchmarks.cases import Case
from dsp_benchmarks.measure.environment import environment
from dsp_benchmarks.measure.timing import TimingRules
from dsp_benchmarks.report.results import Result, Row, Run, write_result
from dsp_benchmarks.run import run_cases
from dsp_benchmarks.subjects.networks import Network
from rich.table import Table

from dsp_cli import options as o
from dsp_cli.show import console, progress_bars
from dsp_kernels.errors import DSPVerificationError
from dsp_pruning.recipes.demo import DemoConfig, DemoResult, run_demo
from dsp_pruning.report import draw_structures

_BATCHES = (1, 32)
_ENGINES = {
    Case("dense", "torch"): "dense",
    Case("packed", "torch"): "packed",
    Case("packed", "fused"): "fused",
}


def demo(
    save_dir: Annotated[Path, typer.Option("--save-dir", help="Folder for the results.")] = Path("runs/demo"),
    epochs: Annotated[
        int,
        typer.Option("--epochs", min=1, help="Of pretraining and of finetuning; group learning takes half."),
    ] = DemoConfig.epochs,
    layers: o.Layers = DemoConfig.depth,
    groups: o.Groups = DemoConfig.groups,
    prune: o.Prune = DemoConfig.prune,
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
    network = Network(f"ResNet-{config.depth}, digits", result.packed, result.dense, image_size)
    rows = run_cases(network, _BATCHES, list(_ENGINES), TimingRules(rounds=rounds, seed=seed))
    if bad := [f"{row.engine}: {row.reason}" for row in rows if row.samples is None]:
        raise DSPVerificationError("; ".join(bad))
    picture = draw_structures(result.packed, save_dir / "structure.png", f"ResNet-{config.depth}, digits")
    run = Run(f"resnet{config.depth}_digits", network.label, "latency", None, tuple(rows))
    raw = write_result(save_dir / "latency.json", Result(environment(), None, (run,)))
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
    made.add_row("packed vs masked", f"{result.packed_difference:.1e}", "largest logit difference")
    made.add_row("fused vs packed", f"{result.fused_difference:.1e}", "largest logit difference")
    made.add_section()
    names = {case.label: name for case, name in _ENGINES.items()}
    dense = {row.batch: row.samples.median for row in rows if row.form == "dense"}
    threads = torch.get_num_threads()
    for row in rows:
        faster = dense[row.batch] / row.samples.median
        made.add_row(
            f"latency {names[row.engine]}, batch {row.batch}",
            f"{1e3 * row.samples.median:.2f} ms",
            f"{faster:.2f}x as fast as dense, {threads} thread{'s' * (threads > 1)}",
        )
    return made
