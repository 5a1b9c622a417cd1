"""``python -m dsp_benchmarks run --net resnet56_g4 --batch 32 --batch 128``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from dsp_kernels.errors import DSPError

from .engines import ENGINES
from .report import COLUMNS, cells
from .run import Row, bench_released, write_json

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. An error of ours is one line."""
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    path = Path(options.net) if options.net.endswith(".npz") else options.nets / f"{options.net}.npz"
    try:
        rows = bench_released(
            path,
            options.batch or [32],
            options.engine or tuple(ENGINES),
            rounds=options.rounds,
            seed=options.seed,
            device=options.device,
        )
    except DSPError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    _print_table(path.stem, rows)
    target = options.out or HERE / "results" / f"{path.stem}_{options.device.replace(':', '')}.json"
    print(f"raw samples: {write_json(target, rows, options.device, net=path.stem)}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsp_benchmarks")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="time a released network in every engine, in one process")
    run.add_argument("--net", required=True, help="name of a released network, or a .npz file")
    run.add_argument("--nets", type=Path, default=HERE.parent.parent / "shared" / "nets", help="their folder")
    run.add_argument("--batch", type=int, action="append", help="may be given several times; default 32")
    run.add_argument("--engine", action="append", help=f"of {', '.join(ENGINES)}; default all")
    run.add_argument("--rounds", type=int, default=30, help="samples per engine")
    run.add_argument("--threads", type=int, help="default: what torch chooses")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--device", default="cpu")
    run.add_argument("--out", type=Path, help="JSON file; default benchmarks/results/<net>_<device>.json")
    return parser


def _print_table(net: str, rows: Sequence[Row]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{net}, {torch.get_num_threads()} threads")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "engine" else "right")
    for line in cells(rows):
        table.add_row(*line)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
