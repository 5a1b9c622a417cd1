"""Native libraries that only tests use, compiled once for all test processes.

A library is built into build/tests/ under a file lock. Its name has a hash of its sources, headers, compiler
and flags, so a stale build is never used. ``python tests/helpers/compiled.py`` builds all in advance.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import ptx.build

__all__ = ["EMULATED_ISA", "emulated_fp16", "why_no_compiler", "why_no_emulated_fp16"]

EMULATED_ISA = "emulated_fp16"
_ROOT = Path(__file__).resolve().parents[2]
_BUILDS = _ROOT / "build" / "tests"
_CPU = _ROOT / "csrc" / "cpu"
_FP16_KERNELS = Path(__file__).with_name("emulated_fp16.cpp")
_FP16_FLAGS = ("-mavx2", "-mfma", "-mf16c")
with mock.patch("setuptools.setup"):
    _SETUP = runpy.run_path(str(_ROOT / "setup.py"))


def why_no_compiler() -> str:
    """Why nothing can be compiled; empty if it can."""
    return "" if _SETUP["find_compiler"]() else "there is no C++ compiler"


def why_no_emulated_fp16() -> str:
    """Why this machine cannot build or run ``emulated_fp16``; empty if it can."""
    cpuinfo = Path("/proc/cpuinfo")
    features = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else []
    needed = {flag.removeprefix("-m") for flag in _FP16_FLAGS}
    if platform.machine() != "x86_64" or not needed <= set(features):
        return f"this CPU lacks one of {', '.join(sorted(needed))}"
    return why_no_compiler()


@cache
def emulated_fp16() -> ModuleType:
    """The CPU extension whose one instruction set is AVX512-FP16 emulated in float arithmetic."""
    spec = importlib.util.spec_from_file_location("_C", _emulated_fp16_library())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _emulated_fp16_library() -> Path:
    import pybind11

    flags = [*_SETUP["COMMON_FLAGS"], "-O1", "-Wno-attributes", f"-I{_CPU}", f"-I{_FP16_KERNELS.parent}"]
    flags += [f"-I{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
    flags += shlex.split(os.environ.get("CXXFLAGS", ""))
    version = importlib.metadata.version("pybind11")
    folders = [_CPU, _FP16_KERNELS.parent]
    return _build("emulated_fp16", sorted(_CPU.glob("*.cpp")), folders, flags, version, _FP16_KERNELS)


def _build(
    name: str,
    sources: Sequence[Path],
    folders: Sequence[Path],
    flags: Sequence[str],
    version: str = "",
    fp16_kernels: Path | None = None,
) -> Path:
    """The path of the library. folders: hashed with all files in them; fp16_kernels: one more source."""
    compiler = _SETUP["find_compiler"]()
    about = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    key = hashlib.sha256(about + repr((compiler, flags, _FP16_FLAGS, version)).encode())
    sources = [*sources, *([fp16_kernels] if fp16_kernels else [])]
    for path in sorted({*sources, *(path for folder in folders for path in folder.rglob("*.[ch]*"))}):
        key.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    _BUILDS.mkdir(parents=True, exist_ok=True)
    library = _BUILDS / f"{name}-{key.hexdigest()[:16]}.so"
    with (_BUILDS / f"{name}.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=_BUILDS) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if library.is_file():
            return library

        def compile_one(source: Path) -> str:
            target = f"{folder}/{source.stem}.o"
            own = _FP16_FLAGS if source == fp16_kernels else ()
            command = [*compiler, *flags, *own, "-fPIC", "-c", str(source), "-o", target]
            subprocess.run(command, check=True)
            return target

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, reversed(sources)))
        unfinished = f"{folder}/library.so"
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        subprocess.run([*compiler, "-shared", "-pthread", *extra, *objects, "-o", unfinished], check=True)
        for stale in _BUILDS.glob(f"{name}-*.so"):
            stale.unlink()
        shutil.move(unfinished, library)
    return library


def main() -> None:
    """Builds every library that this machine can build."""
    builds = [] if why_no_emulated_fp16() else [_emulated_fp16_library]
    builds += [] if ptx.build.why_not() else [ptx.build.build]
    with ThreadPoolExecutor() as pool:
        for library in pool.map(lambda build: build(), builds):
            print(library)


if __name__ == "__main__":
    main()
