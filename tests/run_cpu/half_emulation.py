"""An extension whose one instruction set is AVX512-FP16 computed in float; for tests and measurements."""

from __future__ import annotations

import importlib.util
import os
import platform
import runpy
import shlex
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from unittest import mock

ISA = "emulated_fp16"
_ROOT = Path(__file__).resolve().parents[2]
_KERNELS = Path(__file__).with_name("kernel_emulated_fp16.cpp")
_NEEDED = ("avx2", "fma", "f16c")


def why_not() -> str:
    """Why this machine cannot build or run it; empty if it can."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.exists() else []
    if platform.machine() != "x86_64" or not set(_NEEDED) <= set(flags):
        return f"this CPU has not all of {', '.join(_NEEDED)}"
    return "" if _setup()["find_compiler"]() else "there is no C++ compiler"


def build(folder: Path, half_terms: int | None = None) -> ModuleType:
    """Compiles and imports it. half_terms: as in csrc/cpu/kernels/kernel.h, instead of the product's."""
    import pybind11

    setup = _setup()
    compiler = setup["find_compiler"]()
    plain = [source for source in (_ROOT / "csrc" / "cpu").rglob("*.cpp") if not _of_an_isa(source)]
    flags = [*setup["COMMON_FLAGS"], "-fPIC", f"-I{_ROOT / 'csrc' / 'cpu'}", "-Wno-attributes"]
    flags += [f"-I{path}" for path in (sysconfig.get_paths()["include"], pybind11.get_include())]
    if half_terms is not None:
        flags.append(f"-DDSP_HALF_TERMS={half_terms}")
    extra = shlex.split(os.environ.get("CXXFLAGS", ""))

    def compile_one(source: Path) -> str:
        target = folder / f"{source.stem}.o"
        own = [f"-m{name}" for name in _NEEDED] if source == _KERNELS else []
        subprocess.run(
            [*compiler, *flags, *own, *extra, "-O1", "-c", str(source), "-o", str(target)], check=True
        )
        return str(target)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, [_KERNELS, *sorted(plain, key=lambda path: path.name)]))
    library = folder / "_C.so"
    subprocess.run([*compiler, "-shared", "-pthread", *extra, *objects, "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("_C", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _of_an_isa(source: Path) -> bool:
    return source.name == "isa.cpp" or source.parent.name == "kernels"


def _setup() -> dict:
    """The names in setup.py, without running it."""
    with mock.patch("setuptools.setup"):
        return runpy.run_path(str(_ROOT / "setup.py"))
