"""Builds the interpreter with the project's launchers, and the PTX of its kernels."""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_cuda import CUDA, CXX_FLAGS, NVCC_FLAGS, TARGET_FLAG, cuda_version, find_nvcc, find_torch

SOURCES = Path(__file__).with_name("src")
BUILDS = Path(__file__).resolve().parents[2] / "build" / "tests"
LIBRARY = "libptx.so"
# The chips whose PTX is interpreted. nvcc stops at PTX; ptxas is not needed.
ARCHS = ("80", "90a")
INTERPRETER_FLAGS = ["-std=c++17", "-O3", "-march=native", "-frounding-math", "-Wall", "-Wextra"]
INTERPRETER_FLAGS += ["-Wno-unknown-pragmas", "-fPIC"]
# Torch's functions that torch_on_host.cpp replaces.
REPLACED = ("library_init_impl", "get_device_index", "create_device_guard", "delete_device_guard")
REPLACED += ("get_current_cuda_stream",)


def why_not() -> str:
    """Why nothing can be built here; empty if it can."""
    if shutil.which("g++") is None:
        return "there is no g++"
    return "" if find_nvcc(os.environ) else "there is no nvcc"


def build() -> Path:
    """The folder of LIBRARY and one .ptx per source and chip; nothing is compiled twice."""
    nvcc = find_nvcc(os.environ)
    torch, reason = find_torch()
    if nvcc is None or torch is None:
        raise RuntimeError(why_not() or reason)
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(version + str(torch).encode())
    for path in sorted([*CUDA.iterdir(), *SOURCES.iterdir(), Path(__file__)]):
        key.update(path.name.encode() + path.read_bytes())
    BUILDS.mkdir(parents=True, exist_ok=True)
    finished = BUILDS / f"ptx-{key.hexdigest()[:16]}"
    with (BUILDS / "ptx.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=BUILDS) as name:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if finished.is_dir():
            return finished
        folder = Path(name)
        _compile(nvcc, torch, folder)
        for stale in BUILDS.glob("ptx-*"):
            shutil.rmtree(stale)
        finished.mkdir()
        for path in (folder / LIBRARY, *folder.glob("*.ptx")):
            shutil.move(path, finished)
    return finished


def _compile(nvcc: str, torch: Path, folder: Path) -> None:
    archs = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in ARCHS]
    include = [f"-isystem{torch / 'include'}"]
    about = " ".join([cuda_version(nvcc), *(f"sm_{arch}" for arch in ARCHS)])
    op = ["g++", *CXX_FLAGS, TARGET_FLAG, *include, f'-DDSP_KERNELS_BUILD="{about}"']
    own = ["g++", *INTERPRETER_FLAGS, *include]
    kernels = [nvcc, *NVCC_FLAGS, *archs, "--keep", "--keep-dir", str(folder)]
    commands = {
        **dict.fromkeys(CUDA.glob("*.cu"), kernels),
        **dict.fromkeys(CUDA.glob("*.cpp"), op),
        **dict.fromkeys(SOURCES.glob("*.cpp"), own),
    }

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.parent.name}_{source.stem}.o")
        subprocess.run([*commands[source], "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, commands))
    wrapped = [f"-Wl,--wrap=aoti_torch_{name}" for name in REPLACED]
    link = ["-shared", "-Wl,-Bsymbolic", *wrapped, f"-L{torch / 'lib'}", "-ltorch_cpu"]
    subprocess.run(["g++", *objects, *link, "-o", str(folder / LIBRARY)], check=True)


if __name__ == "__main__":
    print(build())
