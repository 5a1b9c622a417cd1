"""``dsp bench``: ``python -m dsp_benchmarks run`` with a packed network in all its forms."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from dsp_benchmarks import cli as commands
from dsp_benchmarks.cases import allowed_difference
from dsp_benchmarks.engines import ENGINES
from dsp_benchmarks.engines.fused import Fused
from dsp_benchmarks.measure.floors import program_of
from dsp_benchmarks.measure.timing import TimingRules
from dsp_benchmarks.run import Row, time_runners
from torch import nn

from dsp_cli import options as o
from dsp_kernels.file.save_load import input_channels
from dsp_pruning.recipes.run import pick_device


def bench(
    file: Annotated[Path, typer.Argument(help="A packed network (.safetensors).")],
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
    device: o.Device = "cpu",
    mode: Annotated[str, typer.Option("--mode", help="latency, throughput or both.")] = "latency",
    seconds: Annotated[float | None, typer.Option("--seconds", help="Time limit of the whole run.")] = None,
    profile: Annotated[
        str | None, typer.Option("--profile", help="FORM/ENGINE: only show its time per layer.")
    ] = None,
    isolate: Annotated[bool, typer.Option("--isolate", help="Run each engine in its own process.")] = False,
    short: Annotated[
        bool,
        typer.Option("--short/--full", help="Run engines that are slow to build at one batch size only."),
    ] = True,
    report: Annotated[
        bool, typer.Option("--report", help="Also write an HTML page and plots beside --out.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="File for the raw samples (.json).")] = Path(
        "runs/bench.json"
    ),
) -> None:
    """Time a packed network in every engine against its dense original and other pruned forms.

    The dense rows are the network before packing, with random weights: they are shown for speed.
    """
    status = commands.run(
        Namespace(
            net=[str(file)],
            structure=None,
            image_size=image_size,
            batch=batch or [1, 32],
            engine=engine,
            form=form,
            mode=mode,
            rounds=rounds,
            threads=None,
            seed=seed,
            device=str(pick_device(device)),
            isolate=isolate,
            short=short,
            seconds=seconds,
            profile=profile,
            out=out,
            report=report,
        )
    )
    if status:
        raise typer.Exit(status)


def bench_model(
    packed: nn.Module,
    dense: nn.Module,
    batches: Sequence[int],
    image_size: int,
    rounds: int,
    seed: int,
    device: torch.device,
) -> list[Row]:
    """Time dense and packed in plain PyTorch and fused, on random images; checks the output of fused."""
    packed, dense = packed.eval().to(device), dense.eval().to(device)
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for batch in batches:
        x = torch.randn(batch, input_channels(packed), image_size, image_size, generator=generator).to(device)
        runners = {
            "dense": ENGINES["torch"].prepare(dense, x),
            "packed": ENGINES["torch"].prepare(packed, x),
            "fused": Fused().prepare(packed, x),
        }
        expected = runners["packed"](x)
        allowed = allowed_difference(program_of(packed, x[:1]), torch.float32, expected)
        rules = TimingRules(rounds=rounds, seed=seed)
        rows += time_runners(runners, x, expected, allowed, unchecked=("dense",), rules=rules)
    return rows
