"""Registers, stack and selected instructions of the CUDA kernels, read from the library.

Usage: python scripts/cuda_resources.py [library]. Needs cuobjdump (CUDA toolkit or triton's), no GPU.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Column of the table -> pattern of the instruction in cuobjdump's disassembly.
COUNTED = {
    "HMMA": r"\bHMMA\.",
    "HGMMA": r"\bHGMMA\.",
    "waits": r"\bWARPGROUP\.DEPBAR",  # for products of a warpgroup
    "LDSM": r"\bLDSM\.",
    "LDGSTS.128": r"\bLDGSTS\.[A-Z.]*128",
    "STG.128": r"\bSTG\.E[A-Z.]*\.128",
    "STG": r"\bSTG\.",
    "FFMA": r"\bFFMA\b",
    "local": r"\b(?:LDL|STL)\b",
}
_TYPES = {"__half": "fp16", "__nv_bfloat16": "bf16"}


@dataclass
class Kernel:
    """One kernel for one chip: registers per thread, bytes of stack per thread, counted instructions."""

    name: str
    arch: str
    registers: int
    stack: int
    instructions: dict[str, int] = field(default_factory=dict)


def find_cuobjdump() -> str | None:
    """The one on PATH, else the one in triton's package."""
    found = shutil.which("cuobjdump")
    if found:
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    candidate = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(candidate) if candidate.is_file() else None


def plain_name(mangled: str) -> str:
    """chwn_gemm fp16 64, from the mangled name of chwn_gemm<__half, 64>."""
    match = re.search(r"dsp\d+(\w+?)I(?:\d+(__half|__nv_bfloat16)|Lb([01])E)((?:Li\d+E)*)E", mangled)
    if not match:
        return mangled
    kernel, number, nhwc, sizes = match.groups()
    kind = _TYPES[number] if number else "NHWC" if nhwc == "1" else "CHWN"
    return " ".join([kernel, kind, *re.findall(r"\d+", sizes)])


def read_kernels(library: Path, cuobjdump: str) -> list[Kernel]:
    """Every kernel of every chip in the library."""

    def ask(option: str) -> Iterator[tuple[str, str]]:
        """(arch, line) of cuobjdump's answer."""
        done = subprocess.run([cuobjdump, option, str(library)], capture_output=True, text=True, check=True)
        arch = ""
        for line in done.stdout.splitlines():
            found = re.match(r"arch = (\w+)", line) or re.search(r"compressed:.*arch = (\w+)", line)
            arch = found.group(1) if found else arch
            yield arch, line

    kernels: dict[tuple[str, str], Kernel] = {}
    name = ""
    for arch, line in ask("-res-usage"):
        if match := re.search(r"Function (\w+):", line):
            name = plain_name(match.group(1))
        elif match := re.search(r"REG:(\d+) STACK:(\d+)", line):
            kernels[arch, name] = Kernel(name, arch, int(match.group(1)), int(match.group(2)))
    patterns = {what: re.compile(pattern) for what, pattern in COUNTED.items()}
    for arch, line in ask("-sass"):
        if match := re.search(r"Function : (\w+)", line):
            name = plain_name(match.group(1))
            kernels[arch, name].instructions = dict.fromkeys(patterns, 0)
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/\s", line):
            for what, pattern in patterns.items():
                kernels[arch, name].instructions[what] += bool(pattern.search(line))
    # wgmma kernels are compiled empty for other chips.
    kept = [kernel for kernel in kernels.values() if "wgmma" not in kernel.name or kernel.arch == "sm_90a"]
    return sorted(kept, key=lambda kernel: (kernel.arch, kernel.name))


def table(kernels: list[Kernel]) -> str:
    """A Markdown table."""
    lines = [
        "| kernel | chip | registers | stack | " + " | ".join(COUNTED) + " |",
        "|---|---" + "|---:" * (2 + len(COUNTED)) + "|",
    ]
    for kernel in kernels:
        counts = " | ".join(str(kernel.instructions[what]) for what in COUNTED)
        lines.append(f"| {kernel.name} | {kernel.arch} | {kernel.registers} | {kernel.stack} | {counts} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the table."""
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dsp_kernels" / "_C_cuda.so"
    cuobjdump = find_cuobjdump()
    if cuobjdump is None or not library.is_file():
        missing = library if cuobjdump else "cuobjdump (part of the CUDA toolkit, and of triton's package)"
        raise SystemExit(f"there is no {missing}")
    print(table(read_kernels(library, cuobjdump)))


if __name__ == "__main__":
    main()
