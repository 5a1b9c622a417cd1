"""Compile every shipped configuration of the Triton kernel without a GPU, check it, and print a table.

    python scripts/triton_table.py [--out docs/gpu-notes.md] [--only TEXT] [--capability 80 90]

The exit status is 1 if a configuration has a fault (spilled registers, narrow accesses, no tensor cores).
--out replaces the table between the two marks in a Markdown file. With TRITON_CACHE_DIR set, a run that was
stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
import triton
from tqdm import tqdm

from dsp_kernels.run.gpu.triton.aot import compile_config, faults, resident_warps
from dsp_kernels.run.gpu.triton.config import TritonConfig, shipped
from dsp_kernels.whole_file import write_text

BEGIN, END = "<!-- table begins -->", "<!-- table ends -->"
Job = tuple[str, TritonConfig, torch.dtype, dict[str, object], int]
Result = tuple[list[str], list[str]]


def measure(job: Job) -> Result:
    """(cells of the row, faults) of one configuration."""
    name, config, dtype, flags, capability = job
    made = compile_config(config, dtype, capability, **flags)
    cells = [
        *(name, str(dtype).removeprefix("torch."), f"{config.cols} x {config.filters} x {config.bk}"),
        *(f"{config.warps} / {config.stages}", f"sm_{capability}", str(made.registers), str(made.shared)),
        *(str(resident_warps(made, config, capability)), str(made.spill)),
        *(str(made.count(r"wgmma\.mma_async")), str(made.count(r"mma\.sync"))),
        f"{made.count(r'st.global[.a-z0-9]*.v4.b32')} of {made.count(r'st.global')}",
    ]
    return cells, faults(made, config, dtype, capability)


def table(rows: list[list[str]]) -> str:
    """Markdown."""
    head = ["kernel", "dtype", "columns x filters x depth", "warps / stages", "chip", "registers", "shared"]
    head += ["warps held", "spill", "wgmma", "mma", "16-byte stores"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(file: Path, text: str) -> None:
    """Between the two marks of the file."""
    before, _, rest = file.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    write_text(file, f"{before}{BEGIN}\n{text}\n{END}{after}")


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", default="", help="a text that the kernel's name and tile must hold")
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90], choices=(80, 90))
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    jobs: list[Job] = [
        (name, config, dtype, flags, capability)
        for name, config, dtype, flags in shipped()
        for capability in options.capability
        if options.only in f"{name} {dtype} {config.cols}x{config.filters}x{config.bk}"
    ]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = os.environ.get("TRITON_CACHE_DIR", cache)
        with multiprocessing.get_context("fork").Pool(options.processes) as pool:
            results = list(tqdm(pool.imap(measure, jobs), total=len(jobs), disable=not sys.stderr.isatty()))
    text = table([cells for cells, _ in results])
    found = [f"{' '.join(cells[:5])}: {fault}" for cells, bad in results for fault in bad]
    print(text)
    print(
        f"\n{len(jobs)} kernels by triton {triton.__version__} in {time.perf_counter() - start:.0f} s; "
        f"{len(found)} faults"
    )
    print("\n".join(found))
    if options.out is not None:
        write_table(options.out, text)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
