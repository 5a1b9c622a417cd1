"""Building dsp_kernels/_C_cuda.so: whether it can be done here, for which chips, and how. Run by setup.py.

The library knows nothing of Python and uses torch through its stable ABI, so one build serves
every Python and torch 2.10 or newer.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
LIBRARY = "_C_cuda.so"
# Machine code for A100 and H100/H200; newer chips compile the PTX when they first meet it.
DEFAULT_ARCHS = "8.0+PTX;9.0a"
OLDEST = (8, 0)
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "--threads", "2", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CXX_FLAGS = [
    "-std=c++17",
    "-O2",
    "-g0",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
]


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """CUDACXX, then nvcc of CUDA_HOME or CUDA_PATH, of PATH (a wrapper will do), of /usr/local/cuda."""
    path = environment.get("PATH", os.defpath)
    homes = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH")]
    wanted = [environment.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home), "nvcc"]
    for name in [*wanted, "/usr/local/cuda/bin/nvcc"]:
        found = shutil.which(name, path=path) if name else None
        if found:
            return found
    return None


def arch_flags(archs: str) -> list[str]:
    """nvcc's flags for a list like TORCH_CUDA_ARCH_LIST ("8.0 9.0a+PTX"); chips before 8.0 are left out.

    Raises ValueError if an entry is not understood or none is left.
    """
    flags = []
    for entry in re.split(r"[;, ]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {entry!r}; expected numbers like 8.0 or 9.0a+PTX")
        major, minor, feature, ptx = match.groups()
        if (int(major), int(minor)) < OLDEST:
            continue
        name = f"{major}{minor}{feature}"
        codes = f"sm_{name},compute_{name}" if ptx else f"sm_{name}"
        flags.append(f"-gencode=arch=compute_{name},code=[{codes}]")
    if not flags:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST is {archs!r}; the CUDA kernels need 8.0 or newer")
    return flags


def why_not_cuda(environment: Mapping[str, str], torch: Path | None, without_torch: str) -> str:
    """Why the library cannot or shall not be built here; empty if it can.

    torch: the folder of the torch to build for, or None and the reason.
    """
    if environment.get("DSP_KERNELS_CUDA") == "0":
        return "DSP_KERNELS_CUDA is 0"
    if torch is None:
        return without_torch
    if not (torch / "lib" / "libtorch_cuda.so").is_file():
        return "torch is built without CUDA"
    if find_nvcc(environment) is None:
        return "there is no nvcc; install the CUDA toolkit or set CUDA_HOME"
    try:
        arch_flags(environment.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
    except ValueError as error:
        return str(error)
    return ""


def sources() -> list[Path]:
    """One file per number format for convolutions and for blocks, and the two ops."""
    return [*sorted(CUDA.glob("*.cu")), CUDA / "op.cpp", CUDA / "block_op.cpp"]


def build(
    spawn: Callable[[list[str]], None],
    torch: Path,
    torch_target: str,
    compiler: Sequence[str],
    environment: Mapping[str, str],
    temporary: Path,
    target: Path,
) -> None:
    """Compiles what is newer than its object and links ``target``; spawn runs one command or raises.

    torch_target: the flag that names the oldest torch to load on.
    """
    nvcc = find_nvcc(environment)
    assert nvcc is not None
    archs = arch_flags(environment.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
    temporary.mkdir(parents=True, exist_ok=True)
    headers = [*CUDA.glob("*.h"), *CUDA.glob("*.cuh"), Path(__file__)]
    newest_header = max(path.stat().st_mtime for path in headers)

    def compile_one(source: Path) -> str:
        object_file = temporary / (source.stem + ".o")
        command = [nvcc, *NVCC_FLAGS, *archs]
        if source.suffix == ".cpp":
            has_wgmma = int(any("arch=compute_90a" in flag for flag in archs))
            command = [*compiler, *CXX_FLAGS, torch_target, f"-isystem{torch / 'include'}"]
            command.append(f"-DDSP_KERNELS_WGMMA={has_wgmma}")
        stamp = temporary / (source.stem + ".command")
        command += ["-c", str(source), "-o", str(object_file)]
        if (
            not object_file.exists()
            or object_file.stat().st_mtime < max(newest_header, source.stat().st_mtime)
            or not stamp.exists()
            or stamp.read_text(encoding="utf-8") != repr(command)
        ):
            spawn(command)
            stamp.write_text(repr(command), encoding="utf-8")
        return str(object_file)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, sources()))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".tmp")
    # torch's libraries are found already loaded, because the package imports torch first.
    link = ["-shared", "-cudart", "static", f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
    spawn([nvcc, *objects, *link, "-o", str(unfinished)])
    unfinished.replace(target)
