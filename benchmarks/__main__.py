"""``python -m dsp_benchmarks run | compare | report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dsp_kernels.errors import DSPError

from . import cli as commands
from .engines import ENGINES
from .subjects.networks import FORMS

__all__ = ["main"]

_INTERRUPTED = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. An error of ours is one line and status 2.

    ``run`` gives 1 where an engine was wrong or broke, ``compare`` 1 where something became slower.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.function(options)
    except (DSPError, OSError) as error:  # OSError: a file that is not there or may not be written
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return _INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dsp_benchmarks")
    commands_ = parser.add_subparsers(dest="command", required=True)
    _run(commands_.add_parser("run", help="time networks in every engine"))
    compare = commands_.add_parser("compare", help="has the second result become slower than the first?")
    compare.add_argument("first", type=Path)
    compare.add_argument("second", type=Path)
    compare.add_argument("--alpha", type=float, default=0.01, help="of the U-test")
    compare.add_argument("--min-change", type=float, default=commands.MIN_CHANGE, help="share, 0.03 is 3 %%")
    compare.add_argument("--other-machine", action="store_true", help="compare different machines anyway")
    compare.set_defaults(function=commands.compare)
    report = commands_.add_parser("report", help="pages, tables and pictures from a result")
    report.add_argument("result", type=Path, nargs="?", help="JSON file; default: the committed one")
    report.add_argument("--html", type=Path)
    report.add_argument("--csv", type=Path)
    report.add_argument("--markdown", type=Path)
    report.add_argument("--plots", type=Path, help="folder for the PNG files")
    report.add_argument(
        "--readme", type=Path, nargs="?", const=commands.README, help="write the table between its markers"
    )
    report.set_defaults(function=commands.report)
    return parser


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def _counts(text: str) -> list[int]:
    names = _names(text)
    if not names or not all(name.isdecimal() and int(name) > 0 for name in names):
        raise argparse.ArgumentTypeError(f"{text!r}; expected whole numbers above 0, with commas between")
    return [int(name) for name in names]


def _run(run: argparse.ArgumentParser) -> None:
    add = run.add_argument
    nets = "resnet56_g4, resnet50_g2_80, cifar_resnet56, vgg16, a file, ...; repeatable, or with commas"
    add("--net", "--networks", action="extend", type=_names, help=nets)
    add(
        "--structure", help="of an unpruned network: random:g=2,rate=0.7, pruner:g=2,rate=0.7 or an .npz file"
    )
    add("--image-size", type=int)
    add("--batch", "--batches", type=_counts, action="extend", help="as --net; default 1,8,32,128")
    engines = f"of {', '.join(ENGINES)}, or form/engine; as --net; default: a plan of all"
    add("--engine", "--engines", type=_names, action="extend", help=engines)
    add("--form", "--forms", type=_names, action="extend", help=f"of {', '.join(FORMS)}; as --net")
    add("--mode", choices=("latency", "throughput", "both"), default="latency")
    add("--rounds", type=int, default=50, help="turns of each engine")
    add("--threads", type=int, help="default: what torch chooses")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--isolate", action="store_true", help="every engine in a process of its own")
    add(
        "--short",
        action="store_true",
        help="five minutes: slow builds (torch.compile) for one batch size, fewer rounds of slow engines",
    )
    add(
        "--seconds", type=float, help="for everything; what does not fit is a row that says so (--short: 270)"
    )
    add(
        "--profile",
        metavar="FORM/ENGINE",
        help="time per layer of one engine at the first batch size; no timing",
    )
    add("--out", type=Path, help="JSON file; default benchmarks/results/<net>_<device>.json")
    add("--report", action="store_true", help="write .html, .csv, .md and pictures beside the JSON file")
    run.set_defaults(function=commands.run)


if __name__ == "__main__":
    sys.exit(main())
