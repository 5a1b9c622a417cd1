"""``dsp bench``: ``python -m dsp_benchmarks run`` with a packed network in all its forms."""

import tempfile
from argparse import Namespace
from pathlib import Path
from typing import Annotated

import typer
from dsp_benchmarks import cli as commands

import dsp_kernels
from dsp_cli import options as o
from dsp_cli.files import packed_network
from dsp_pruning.recipes.run import pick_device


def bench(
    file: o.File,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", help="Batch size; repeatable. Default: 1 and 32.")
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option("--engine", help="Engine; repeatable. Default: all that fit the time.")
    ] = None,
    form: Annotated[
        list[str] | None,
        typer.Option("--form", help="dense, packed, compacted or filters; repeatable. Default: all."),
    ] = None,
    image_size: o.ImageSize = None,
    rounds: o.Rounds = 30,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    mode: Annotated[str, typer.Option("--mode", help="latency, throughput or both.")] = "latency",
    seconds: Annotated[float | None, typer.Option("--seconds", help="Time limit of the whole run.")] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="FORM/ENGINE: only show its time per layer.")
    ] = None,
    short: Annotated[
        bool,
        typer.Option("--short/--full", help="Run engines that are slow to build at one batch size only."),
    ] = True,
    report: Annotated[
        bool, typer.Option("--report", help="Also write an HTML page and plots beside --out.")
    ] = False,
    model: o.Model = "",
    model_args: o.ModelArgs = None,
    out: Annotated[Path, typer.Option("--out", help="File for the raw samples (.json).")] = Path(
        "runs/bench.json"
    ),
) -> None:
    """Time a packed network in every engine against its dense original and other pruned forms.

    The dense rows are the network before packing, with random weights: they are shown for speed.
    With --model, FILE holds the weights that dsp finetune wrote.
    """
    given = locals()  # under the names of the options of `run`
    with tempfile.TemporaryDirectory() as folder:
        if model:
            packed, example, _ = packed_network(file, image_size, model, model_args)
            file = Path(folder) / file.with_suffix(".safetensors").name
            dsp_kernels.save(packed, file, example)
        chosen = {"net": [str(file)], "structure": None, "batch": batch or [1, 32]}
        status = commands.run(Namespace(**given | chosen | {"device": str(pick_device(device))}))
    if status:
        raise typer.Exit(status)
