"""Compile every shipped configuration of the Triton kernel without a GPU, check it, and print a table.

    python scripts/triton_table.py [--only TEXT] [--capability 80 90 100 120]

The exit status is 1 if a configuration has a fault (spilled registers, narrow accesses, no tensor cores).
With TRITON_CACHE_DIR set, an interrupted run resumes.
"""

import argparse
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsp_kernels.run.gpu.layout import GpuLayout
from dsp_kernels.run.gpu.triton.config import TritonConfig, config_of, tile_sizes
from dsp_kernels.run.gpu.triton.kernel import INTEGER_ARGUMENTS, conv_kernel_function

Job = tuple[str, TritonConfig, torch.dtype, dict[str, object], int]
Result = tuple[list[str], list[str]]


@dataclass(frozen=True)
class Chip:
    """A multiprocessor: bytes of shared memory, warps; its tensor cores' instruction in PTX and in SASS."""

    shared: int
    warps: int
    ptx: str
    sass: str


# By compute capability: A100, H100, B200, RTX 50.
CHIPS = {
    80: Chip(164 << 10, 64, "mma.sync", "HMMA"),
    90: Chip(228 << 10, 64, "wgmma.mma_async", "HGMMA"),
    100: Chip(228 << 10, 64, "tcgen05.mma", "UTCHMMA"),
    120: Chip(100 << 10, 48, "mma.sync", "HMMA"),
}
_REGISTERS, _RESERVED = 1 << 16, 1 << 10  # of a multiprocessor; bytes of shared memory of each program
# Warps that a multiprocessor should hold: three for each of its four schedulers, so that two can wait for
# memory or a barrier while one issues; two where the sums of a tile take 64 registers of every thread.
_WARPS_WANTED, _WARPS_WANTED_WIDE, _WIDE = 12, 8, 64 * 128
_ASYNC_16_BYTES = r"cp\.async\.c[ga]\.shared\.global \[[^\]]*\], \[[^\]]*\], (?:0x10|16)\b"

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Compiled:
    """Registers per thread, shared memory and spilled (local) memory in bytes, and the code."""

    registers: int
    shared: int
    spill: int
    ptx: str
    sass: str

    def count(self, pattern: str) -> int:
        """Occurrences of a regular expression in the PTX."""
        return len(re.findall(pattern, self.ptx))


def compile_config(config: TritonConfig, dtype: torch.dtype, capability: int, **flags: object) -> Compiled:
    """The kernel for one of CHIPS. flags: constexpr arguments that the configuration lacks."""
    constants: dict[str, object] = {
        "POINTWISE": False,
        "WIDE_IN": False,
        "WIDE_OUT": False,
        "BIG": False,
        "HAS_RESIDUAL": True,
        "ACTIVATION": 1,
        "PRECISION": "ieee",
        "EXACT": False,
        **config.constants(),
        **flags,
    }
    element = _TYPES[dtype]
    kernel = triton.runtime.jit.JITFunction(conv_kernel_function)
    pointers = {
        **dict.fromkeys(("x_ptr", "out_ptr", "residual_ptr", "w_ptr"), f"*{element}"),
        "bias_ptr": "*fp32",
        **dict.fromkeys(("k_ptr", "tile_ptr", "filter_ptr"), "*i32"),
    }
    kinds = {**pointers, **dict.fromkeys(INTEGER_ARGUMENTS, "i32"), **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: kinds[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=config.options())
    usage, sass = _inspect(binary.asm["cubin"])
    return Compiled(
        int(usage["REG"]),
        int(binary.metadata.shared),
        int(usage["STACK"]) + int(usage["LOCAL"]),
        binary.asm["ptx"],
        sass,
    )


def _inspect(cubin: bytes) -> tuple[dict[str, str], str]:
    """Resource usage and disassembly, by the tools in triton's package."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, sass = (
            subprocess.run([cuobjdump, what, file], check=True, capture_output=True, text=True).stdout
            for what in ("-res-usage", "-sass")
        )
    return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)), sass


def resident_warps(made: Compiled, config: TritonConfig, capability: int) -> int:
    """Warps of such programs that fit one multiprocessor. Registers are allocated in multiples of 8."""
    chip = CHIPS[capability]
    per_program = config.warps * 32 * -(-made.registers // 8) * 8
    in_shared = chip.shared // (made.shared + _RESERVED)
    return config.warps * min(_REGISTERS // per_program, in_shared, chip.warps // config.warps)


def faults(made: Compiled, config: TritonConfig, dtype: torch.dtype, capability: int) -> list[str]:
    """What is wrong with a compiled configuration."""
    found = []
    if made.spill:
        found.append(f"{made.spill} bytes of registers are spilled")
    warps = resident_warps(made, config, capability)
    wanted = _WARPS_WANTED_WIDE if config.cols * config.filters >= _WIDE else _WARPS_WANTED
    if warps < wanted:
        found.append(
            f"{made.registers} registers and {made.shared} bytes of shared memory leave {warps} warps on a "
            f"multiprocessor; {wanted} are wanted"
        )
    if dtype != torch.float32:
        chip = CHIPS[capability]
        if chip.ptx not in made.ptx or chip.sass not in made.sass:
            found.append(f"no {chip.ptx} instructions")
        if config.chwn:
            if not made.count(_ASYNC_16_BYTES):
                found.append("no asynchronous 16-byte reads")
            if re.search(r"LDG\.E\.U16", made.sass):
                found.append("activations are read 2 bytes at a time")
    if config.chwn:
        stores, wide = made.count(r"st\.global"), made.count(r"st\.global[.\w]*\.v4\.b32")
        if stores != wide:
            found.append(f"only {wide} of {stores} stores are of 16 bytes")
    return found


def shipped() -> Iterator[tuple[str, TritonConfig, torch.dtype, dict[str, object]]]:
    """Every configuration that the rule can choose, at batch 256: (name, configuration, dtype, flags)."""
    for layout, wide in ((GpuLayout.CHWN, True), (GpuLayout.NHWC, True), (GpuLayout.NHWC, False)):
        kind = layout.name if wide else f"{layout.name} by channel"
        flags: dict[str, object] = {"WIDE_IN": False, "WIDE_OUT": False}
        if layout is GpuLayout.NHWC:
            flags = {"WIDE_IN": wide, "WIDE_OUT": wide}
        for dtype in (torch.float16, torch.float32):
            for pointwise in (False, True) if dtype == torch.float16 else (False,):
                name = f"{kind} {'1x1' if pointwise else 'k x k'}"
                for cols, filters, bk in product(*tile_sizes(wide, dtype)):
                    config = config_of(layout, pointwise, cols, filters, bk, 256)
                    yield name, config, dtype, {**flags, "POINTWISE": pointwise}


def measure(job: Job) -> Result:
    """(cells of the row, faults) of one configuration."""
    name, config, dtype, flags, capability = job
    made = compile_config(config, dtype, capability, **flags)
    cells = [
        *(name, str(dtype).removeprefix("torch."), f"{config.cols} x {config.filters} x {config.bk}"),
        *(f"{config.warps} / {config.stages}", f"sm_{capability}", str(made.registers), str(made.shared)),
        *(str(resident_warps(made, config, capability)), str(made.spill)),
        f"{made.ptx.count(CHIPS[capability].ptx)} {CHIPS[capability].ptx}",
        f"{made.count(r'st.global[.a-z0-9]*.v4.b32')} of {made.count(r'st.global')}",
    ]
    return cells, faults(made, config, dtype, capability)


def table(rows: list[list[str]]) -> str:
    """Markdown."""
    head = ["kernel", "dtype", "columns x filters x depth", "warps / stages", "chip", "registers", "shared"]
    head += ["warps held", "spill", "tensor cores", "16-byte stores"]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="compile kernels whose name and tile contain this text")
    parser.add_argument("--capability", type=int, nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    jobs: list[Job] = [
        (name, config, dtype, flags, capability)
        for name, config, dtype, flags in shipped()
        for capability in options.capability
        if options.only in f"{name} {dtype} {config.cols}x{config.filters}x{config.bk}"
    ]
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = os.environ.get("TRITON_CACHE_DIR", cache)
        with multiprocessing.get_context("fork").Pool(options.processes) as pool:
            results = list(tqdm(pool.imap(measure, jobs), total=len(jobs), disable=not sys.stderr.isatty()))
    found = [f"{' '.join(cells[:5])}: {fault}" for cells, bad in results for fault in bad]
    print(table([cells for cells, _ in results]))
    print(f"\n{len(jobs)} kernels by triton {triton.__version__}; {len(found)} faults")
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
