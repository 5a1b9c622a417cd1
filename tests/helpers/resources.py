"""Registers, stack and code of compiled kernels, read by cuobjdump."""

import importlib.util
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

_TYPES = {"__half": "fp16", "__nv_bfloat16": "bf16"}


@dataclass
class Kernel:
    """A kernel for one chip: registers per thread, bytes of stack and spills per thread, the disassembly."""

    name: str
    arch: str
    registers: int
    stack: int
    sass: str = field(default="", repr=False)

    def count(self, pattern: str) -> int:
        """Occurrences of a regular expression in the disassembly."""
        return len(re.findall(pattern, self.sass))


def find_cuobjdump() -> str | None:
    """The one on PATH, else the one in triton's package."""
    spec = importlib.util.find_spec("triton")
    inside = Path(spec.origin or "").parent / "backends" / "nvidia" / "bin" if spec else None
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=inside) if inside else None)


def plain_name(mangled: str) -> str:
    """chwn_gemm fp16 64, from the mangled name of chwn_gemm<__half, 64>."""
    match = re.search(r"dsp\d+(\w+?)I(?:\d+(__half|__nv_bfloat16)|Lb([01])E)((?:Li\d+E)*)E", mangled)
    if not match:
        return mangled
    kernel, number, nhwc, sizes = match.groups()
    kind = _TYPES[number] if number else "NHWC" if nhwc == "1" else "CHWN"
    return " ".join([kernel, kind, *re.findall(r"\d+", sizes)])


def read_kernels(file: Path, cuobjdump: str) -> list[Kernel]:
    """Every kernel of every chip in a library or cubin."""

    def ask(option: str) -> list[tuple[str, str, str]]:
        """(chip, kernel, what cuobjdump says of it)."""
        text = subprocess.run([cuobjdump, option, file], capture_output=True, text=True, check=True).stdout
        arch, found = "", []
        for part in re.split(r"(?=\barch = )|Function ?(?=[:\w])", text):
            if match := re.match(r"arch = (\w+)", part):
                arch = match[1]
            elif match := re.match(r":? ?(\w+):?\n", part):
                found.append((arch, plain_name(match[1]), part))
        return found

    kernels = {}
    for arch, name, text in ask("-res-usage"):
        sizes = {what: int(size) for what, size in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
        kernels[arch, name] = Kernel(name, arch, sizes["REG"], sizes["STACK"] + sizes["LOCAL"])
    for arch, name, text in ask("-sass"):
        kernels[arch, name].sass = text
    # wgmma kernels are compiled empty for other chips.
    kept = [kernel for kernel in kernels.values() if "wgmma" not in kernel.name or kernel.arch == "sm_90a"]
    return sorted(kept, key=lambda kernel: (kernel.arch, kernel.name))
