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
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from unittest import mock

import ptx.build

from dsp_kernels.run.cpu.extension import native

__all__ = ["EMULATED", "emulated", "why_no_compiler", "why_not_emulated"]

_ROOT = Path(__file__).resolve().parents[2]
_BUILDS = _ROOT / "build" / "tests"
_CPU = _ROOT / "csrc" / "cpu"
_HELPERS = Path(__file__).parent
with mock.patch("setuptools.setup"):
    _SETUP = runpy.run_path(str(_ROOT / "setup.py"))
_MODULE = native()
_HAS_AMX = _MODULE is not None and "avx512_amx" in _MODULE.available_isas()
_REAL_AMX = [*_SETUP["OPTIONAL"]["AVX512_AMX"][0], "-DDSP_REAL_AMX"]
# Emulated instruction sets, whose kernels are in files of their names: compiler flags.
EMULATED = {
    "emulated_fp16": ["-mavx2", "-mfma", "-mf16c"],
    "emulated_amx": [*_SETUP["AVX512_FLAGS"], *(_REAL_AMX if _HAS_AMX else [])],
}


def why_no_compiler() -> str:
    """Why nothing can be compiled; empty if it can."""
    return "" if _SETUP["find_compiler"]() else "there is no C++ compiler"


def why_not_emulated(isa: str) -> str:
    """Why this machine cannot build or run one of EMULATED; empty if it can."""
    cpuinfo = Path("/proc/cpuinfo")
    features = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else []
    flags = [flag.removeprefix("-m") for flag in EMULATED[isa] if flag.startswith("-m") and "=" not in flag]
    needed = {flag.replace("-", "_") for flag in flags}
    if platform.machine() != "x86_64" or not needed <= set(features):
        return f"this CPU lacks one of {', '.join(sorted(needed))}"
    return why_no_compiler()


@cache
def emulated() -> ModuleType:
    """The CPU extension whose instruction sets are EMULATED, each in arithmetic that this CPU has."""
    spec = importlib.util.spec_from_file_location("_C", _emulated_library())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _emulated_library() -> Path:
    """The path of the library."""
    import pybind11

    flags = [*_SETUP["COMMON_FLAGS"], "-O1", "-Wno-attributes", f"-I{_CPU}", f"-I{_HELPERS}"]
    flags += [f"-I{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))
    compiler = _SETUP["find_compiler"]()
    about = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
    version = importlib.metadata.version("pybind11")
    key = hashlib.sha256(about + repr((compiler, flags, extra, EMULATED, version)).encode())
    sources = sorted([*_CPU.glob("*.cpp"), *_HELPERS.glob("*.cpp")])
    for path in sorted([*sources, *_CPU.rglob("*.h"), *_HELPERS.glob("*.h")]):
        key.update(f"{path.relative_to(_ROOT)}\n".encode() + path.read_bytes())
    _BUILDS.mkdir(parents=True, exist_ok=True)
    library = _BUILDS / f"emulated-{key.hexdigest()[:16]}.so"
    with (_BUILDS / "emulated.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=_BUILDS) as folder:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
        if library.is_file():
            return library

        def compile_one(source: Path) -> str:
            target = f"{folder}/{source.stem}.o"
            own = [*EMULATED.get(source.stem, ()), *extra, "-fPIC"]
            command = [*compiler, *flags, *own, "-c", str(source), "-o", target]
            subprocess.run(command, check=True)
            return target

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, reversed(sources)))
        unfinished = f"{folder}/library.so"
        subprocess.run([*compiler, "-shared", "-pthread", *extra, *objects, "-o", unfinished], check=True)
        for stale in _BUILDS.glob("emulated-*.so"):
            stale.unlink()
        shutil.move(unfinished, library)
    return library


def main() -> None:
    """Builds every library that this machine can build."""
    builds = [] if all(map(why_not_emulated, EMULATED)) else [_emulated_library]
    builds += [] if ptx.build.why_not() else [ptx.build.build]
    with ThreadPoolExecutor() as pool:
        for library in pool.map(lambda build: build(), builds):
            print(library)


if __name__ == "__main__":
    main()
