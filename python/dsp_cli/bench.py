"""``dsp bench``: dense, packed and fused side by side, in one process."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from dsp_benchmarks.engines import fused, torch_eager
from dsp_benchmarks.report import COLUMNS, cells
from dsp_benchmarks.run import Row, time_runners, write_json
from torch import nn

import dsp_kernels
from dsp_cli import options as o
from dsp_cli.show import console, table, threads
from dsp_cli.twin import dense_twin, input_channels
from dsp_pruning.recipes.run import pick_device


def bench(
    file: Annotated[Path, typer.Argument(help="A packed network.")],
    batch: Annotated[list[int] | None, typer.Option("--batch", help="May be given several times.")] = None,
    image_size: o.ImageSize = 32,
    rounds: o.Rounds = 30,
    seed: o.Seed = 0,
    device: o.Device = "cpu",
    out: Annotated[Path | None, typer.Option("--out", help="Write the raw samples here (.json).")] = None,
) -> None:
    """Time a packed network against its dense original and its fused form.

    The dense row is the same architecture before pruning, with random weights: it is shown for its speed.
    """
    packed = dsp_kernels.load(file)
    place = pick_device(device)
    rows = bench_model(packed, dense_twin(packed), batch or [1, 32], image_size, rounds, seed, place)
    console.print(table(f"{file}, {threads()}", COLUMNS, cells(rows)))
    if out is not None:
        console.print(f"raw samples: {write_json(out, rows, str(place), file=str(file))}", soft_wrap=True)


def bench_model(
    packed: nn.Module,
    dense: nn.Module,
    batches: Sequence[int],
    image_size: int,
    rounds: int,
    seed: int,
    device: torch.device,
) -> list[Row]:
    """Time dense, packed and fused on random images; fused must give what packed gives."""
    packed, dense = packed.eval().to(device), dense.eval().to(device)
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for batch in batches:
        x = torch.randn(batch, input_channels(packed), image_size, image_size, generator=generator).to(device)
        runners = {
            "dense": torch_eager.prepare(dense, x),
            "packed": torch_eager.prepare(packed, x),
            "fused": fused.prepare(packed, x),
        }
        expected = runners["packed"](x)
        rows += time_runners(runners, x, expected, unchecked=("dense",), rounds=rounds, seed=seed)
    return rows
