"""The kernel compiled ahead of time, without a GPU, and what the compiler made of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsp_kernels.run.gpu.triton.config import TritonConfig
from dsp_kernels.run.gpu.triton.kernel import INTEGER_ARGUMENTS, conv_kernel_function

__all__ = ["Compiled", "compile_config", "faults", "resident_warps"]

# Of a multiprocessor: registers; bytes of shared memory by capability (1 KiB goes with each program); warps.
_REGISTERS, _SHARED, _WARPS = 1 << 16, {80: 164 << 10, 90: 228 << 10}, 64
# Warps that a multiprocessor should hold at once: three for each of its four schedulers, so that two can wait
# for memory or a barrier while one issues; two where a tile's sums alone take 64 registers of every thread.
_WARPS_WANTED, _WARPS_WANTED_WIDE, _WIDE = 12, 8, 64 * 128
_ASYNC_16_BYTES = r"cp\.async\.c[ga]\.shared\.global \[[^\]]*\], \[[^\]]*\], (?:0x10|16)\b"

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Compiled:
    """Registers per thread, shared memory and spilled (local) memory in bytes, and the code itself."""

    registers: int
    shared: int
    spill: int
    ptx: str
    sass: str

    def count(self, pattern: str) -> int:
        """Occurrences of a regular expression in the PTX."""
        return len(re.findall(pattern, self.ptx))


def compile_config(config: TritonConfig, dtype: torch.dtype, capability: int, **flags: object) -> Compiled:
    """The kernel of one configuration for compute capability 80 or 90.

    flags: constexpr arguments of the kernel other than those the configuration sets.
    """
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
    """Resource usage and disassembly by the tools that triton brings with it."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _run(tools / "cuobjdump", "-res-usage", str(file))
        sass = _run(tools / "cuobjdump", "-sass", str(file))
    return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)), sass


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resident_warps(made: Compiled, config: TritonConfig, capability: int) -> int:
    """Warps of such programs that one multiprocessor holds. A thread's registers are given out in eights."""
    per_program = config.warps * 32 * -(-made.registers // 8) * 8
    shared = _SHARED[90 if capability >= 90 else 80]
    programs = min(_REGISTERS // per_program, shared // (made.shared + 1024), _WARPS // config.warps)
    return config.warps * programs


def faults(made: Compiled, config: TritonConfig, dtype: torch.dtype, capability: int) -> list[str]:
    """What is wrong with a compiled configuration, in words; nothing for a good one."""
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
        tensor_core = r"wgmma\.mma_async" if capability >= 90 else r"mma\.sync"
        if not made.count(tensor_core) or ("HGMMA" if capability >= 90 else "HMMA") not in made.sass:
            found.append(f"no {tensor_core} instructions")
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
