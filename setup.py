"""Packages and native extensions; everything else is in pyproject.toml."""

import os
import platform
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
CPU_SOURCES = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / "cpu").rglob("*.cpp"))
CPU_HEADERS = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / "cpu").rglob("*.h"))

COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
COMMON_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-pthread"]
X86_64 = ("x86_64", "AMD64")
# One source file per instruction set; the extension chooses among them at run time.
AVX512 = ("f", "dq", "bw", "vl")
AVX512_FLAGS = [*(f"-mavx512{part}" for part in AVX512), "-mfma", "-mprefer-vector-width=512"]
# Instruction sets that a compiler or its assembler may not support: name -> flags, one of its instructions.
# Without support their source files compile to nothing.
OPTIONAL = {
    "AVX512_VNNI": (["-mavx512vnni"], "vpdpbusd %zmm0, %zmm0, %zmm0"),  # gcc 8, clang 7
    "AVX512_BF16": (["-mavx512bf16"], "vdpbf16ps %zmm0, %zmm0, %zmm0"),  # gcc 10, clang 9
    "AVX512_FP16": (["-mavx512fp16"], "vfmadd231ph %zmm0, %zmm0, %zmm0"),  # gcc 12, clang 14, binutils 2.38
    "AVX512_AMX": (  # gcc 12, clang 14
        ["-mamx-tile", "-mamx-int8", "-mamx-bf16"],
        "tdpbf16ps %tmm2, %tmm1, %tmm0",
    ),
}
AMX_FLAGS = [*AVX512_FLAGS, *(flag for flags, _ in OPTIONAL.values() for flag in flags)]
ISA_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma"],
    "avx512.cpp": AVX512_FLAGS,
    "avx512_vnni.cpp": [*AVX512_FLAGS, "-mavx512vnni"],
    "avx512_bf16.cpp": [*AVX512_FLAGS, "-mavx512vnni", "-mavx512bf16"],
    "avx512_fp16.cpp": [flag for flag in AMX_FLAGS if "-mamx" not in flag],
    "avx512_amx.cpp": AMX_FLAGS,
}


def why_not_native() -> str:
    """Why the CPU extension cannot be built here; empty if it can. DSP_KERNELS_CPU=0 leaves it out."""
    if os.environ.get("DSP_KERNELS_CPU") == "0":
        return "DSP_KERNELS_CPU is 0"
    compiler = find_compiler()
    if sys.platform == "win32" or compiler is None:
        return "there is no C++ compiler; install g++ or clang++, or set CXX"
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        return f"there are no Python headers in {headers}; install python3-dev"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed; `pip install pybind11`, or build without --no-build-isolation"
    return ""


def find_compiler() -> list[str] | None:
    """The command of the C++ compiler: CXX, else Python's own, g++ or clang++; None if there is none."""
    if chosen := shlex.split(os.environ.get("CXX", "")):
        return chosen if shutil.which(chosen[0]) else None
    own = shlex.split(sysconfig.get_config_var("CXX") or "c++")[:1]
    return next(([name] for name in (*own, "g++", "clang++") if shutil.which(name)), None)


def supports(compiler: list[str], flags: list[str], instruction: str) -> bool:
    """Whether the compiler knows the flags, and its assembler the instruction."""
    source = f'void probe() {{ asm("{instruction}"); }}'
    command = [*compiler, *flags, "-x", "c++", "-c", "-", "-o", os.devnull]
    return subprocess.run(command, input=source.encode(), capture_output=True, check=False).returncode == 0


def announce(text: str) -> None:
    """One line, easy to find in the output of `pip install -v`; without -v pip shows no build output."""
    print(f"dsp-kernels: {text}", file=sys.stderr)


class BuildPython(build_py):
    """Begins with an empty folder: what an earlier build left there would be packed too."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Builds what this machine can build and reports it; without a compiler the package is pure Python."""

    def run(self) -> None:
        reason = why_not_native()
        if reason:
            self.extensions = []
            announce(f"building without dsp_kernels._C (networks run in plain PyTorch): {reason}")
        super().run()
        if not reason:
            announce("built dsp_kernels._C, the native CPU kernels")
        self.build_cuda()

    def build_cuda(self) -> None:
        """The CUDA kernels, if nvcc and a CUDA build of torch exist; DSP_KERNELS_CUDA=1 raises otherwise."""
        cuda = runpy.run_path(str(HERE / "tools" / "build_cuda.py"))
        torch, without_torch = cuda["find_torch"]()
        compiler = find_compiler()
        reason = cuda["why_not_cuda"](os.environ, torch, without_torch)
        if not reason and compiler is None:
            reason = "there is no C++ compiler; install g++ or clang++, or set CXX"
        required = os.environ.get("DSP_KERNELS_CUDA") == "1"
        if not reason:
            target = Path(self.get_ext_fullpath("dsp_kernels._C")).parent / cuda["LIBRARY"]
            folder = Path(self.build_temp) / "dsp_kernels._C_cuda"
            try:
                about = cuda["build"](self.spawn, torch, compiler, os.environ, folder, target)
            except Exception as error:
                if required:
                    raise
                reason = f"the build failed ({error})"
            else:
                announce(f"built dsp_kernels/_C_cuda.so, the CUDA kernels, with CUDA {about}")
        if reason and required:
            raise SystemExit(f"dsp-kernels: DSP_KERNELS_CUDA is 1, but {reason}")
        if reason:
            without = "dsp_kernels/_C_cuda.so (the CUDA kernels)"
            announce(f"building without {without}: {reason}. GPUs will run the Triton kernels or PyTorch's")

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        compiler = find_compiler()
        assert compiler is not None
        folder = Path(self.build_temp) / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        newest_header = max(Path(header).stat().st_mtime for header in ext.depends)
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        x86 = platform.machine() in X86_64
        supported = [name for name in OPTIONAL if x86 and supports(compiler, *OPTIONAL[name])]
        unsupported = {flag for name in OPTIONAL if name not in supported for flag in OPTIONAL[name][0]}
        common = [*compiler, *COMMON_FLAGS, *(f"-DDSP_HAS_{name}" for name in supported), *extra, "-fPIC"]
        common += [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]

        def compile_one(source: str) -> str:
            target = folder / (Path(source).stem + ".o")
            newest = max(newest_header, Path(source).stat().st_mtime)
            flags = ISA_FLAGS.get(Path(source).name, []) if x86 else []
            flags = [flag for flag in flags if flag not in unsupported]
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                self.spawn([*common, *flags, "-c", source, "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, ext.sources))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        temporary = library.with_suffix(".tmp")
        self.spawn([*compiler, "-shared", "-pthread", *extra, *objects, *link, "-o", str(temporary)])
        temporary.replace(library)


setup(
    packages=[
        *find_packages(".", include=["dsp_kernels", "dsp_kernels.*"]),
        *find_packages("python"),
        "dsp_benchmarks",
        *(f"dsp_benchmarks.{name}" for name in find_packages("benchmarks")),
    ],
    ext_modules=[Extension("dsp_kernels._C", CPU_SOURCES, depends=CPU_HEADERS, language="c++")],
    cmdclass={"build_ext": BuildNative, "build_py": BuildPython},
)
