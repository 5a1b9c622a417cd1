"""Packages and native extensions; everything else stands in pyproject.toml."""

from __future__ import annotations

import importlib.metadata
import importlib.util
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

HERE = Path(__file__).resolve().parent
CPU_SOURCES = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / "cpu").rglob("*.cpp"))
CPU_HEADERS = sorted(str(path.relative_to(HERE)) for path in (HERE / "csrc" / "cpu").rglob("*.h"))

# Native extensions, one entry each.
NATIVE_EXTENSIONS: list[Extension] = [
    Extension("dsp_kernels._C", CPU_SOURCES, depends=CPU_HEADERS, language="c++"),
]

COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
COMMON_FLAGS += ["-Wall", "-Wextra", "-Wno-psabi", "-pthread"]
# The file that needs torch's headers. Its flags name the oldest torch that the build shall load on.
TORCH_SOURCE = "csrc/torch_op.cpp"
SCHEMA_FILE = "dsp_kernels/op/torch_op.py"
# The library of CUDA kernels: dsp_kernels/_C_cuda.so.
CUDA_BUILD = "tools/build_cuda.py"
OLDEST_TORCH = (2, 10)
# One file per instruction set; the extension chooses among them when it runs.
AVX512 = ("f", "dq", "bw", "vl")
AVX512_FLAGS = [*(f"-mavx512{part}" for part in AVX512), "-mfma", "-mprefer-vector-width=512"]
# What a compiler or its assembler may lack: name -> flag, instruction. Files compile to nothing without it.
OPTIONAL = {
    "AVX512_BF16": ("-mavx512bf16", "vdpbf16ps"),  # gcc 10, clang 9
    "AVX512_FP16": ("-mavx512fp16", "vfmadd231ph"),  # gcc 12, clang 14, binutils 2.38
}
ISA_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma"],
    "avx512.cpp": AVX512_FLAGS,
    "avx512_bf16.cpp": [*AVX512_FLAGS, OPTIONAL["AVX512_BF16"][0]],
    "avx512_fp16.cpp": [*AVX512_FLAGS, *(flag for flag, _ in OPTIONAL.values())],
}


def why_not_native() -> str:
    """Why the CPU extension cannot be built here; empty if it can. DSP_KERNELS_CPU=0 leaves it out."""
    if os.environ.get("DSP_KERNELS_CPU") == "0":
        return "DSP_KERNELS_CPU is 0"
    compiler = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")[0]
    if sys.platform == "win32" or not (
        shutil.which(compiler) or shutil.which("g++") or shutil.which("clang++")
    ):
        return f"there is no C++ compiler ({compiler}); install g++ or clang++"
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").is_file():
        return f"there are no Python headers in {headers}; install python3-dev"
    try:
        import pybind11  # noqa: F401
    except ImportError:
        return "pybind11 is not installed; `pip install pybind11`, or build without --no-build-isolation"
    return ""


def find_compiler() -> list[str] | None:
    """The C++ compiler's command: CXX, Python's own, g++ or clang++; None if there is none."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    own = shlex.split(sysconfig.get_config_var("CXX") or "c++")[:1]
    return next(([name] for name in (*own, "g++", "clang++") if shutil.which(name)), None)


def find_torch() -> tuple[Path | None, str]:
    """The folder of a torch that the op's schema can be compiled against, or None and the reason."""
    try:
        spec = importlib.util.find_spec("torch")
        version = importlib.metadata.version("torch")
    except (ImportError, ValueError):
        spec, version = None, ""
    if spec is None or not spec.submodule_search_locations:
        return None, "torch is not importable here; build with --no-build-isolation"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        return None, f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    return Path(spec.submodule_search_locations[0]), ""


def torch_target() -> str:
    """The flag that names the oldest torch on which a build through the stable ABI shall load."""
    major, minor = OLDEST_TORCH
    return f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48:#x}ULL"


def torch_flags(torch: Path) -> list[str]:
    """Compiler flags of the file that registers the op; the schema's text comes from its one place."""
    schema = runpy.run_path(str(HERE / SCHEMA_FILE))
    return [
        torch_target(),
        f'-DDSP_OP_NAME="{schema["OP_NAME"]}"',
        f'-DDSP_OP_SCHEMA="{schema["SCHEMA"]}"',
        f"-isystem{torch / 'include'}",
    ]


class BuildNative(build_ext):
    """Builds what this machine can build and says so; without a compiler the package is pure Python."""

    def run(self) -> None:
        reason = why_not_native()
        self.torch, without_torch = find_torch()
        if reason:
            self.extensions = []
            self.announce_line(f"building without dsp_kernels._C (networks run in plain PyTorch): {reason}")
        super().run()
        if not reason:
            op = (
                f"; Python registers the torch op, because {without_torch}"
                if without_torch
                else " and the torch op"
            )
            self.announce_line(f"built dsp_kernels._C, the native CPU kernels{op}")
        self.build_cuda(without_torch)

    def build_cuda(self, without_torch: str) -> None:
        """The CUDA kernels, where nvcc and a CUDA torch are; DSP_KERNELS_CUDA=1 raises elsewhere."""
        cuda = runpy.run_path(str(HERE / CUDA_BUILD))
        compiler = find_compiler()
        reason = cuda["why_not_cuda"](os.environ, self.torch, without_torch)
        if not reason and compiler is None:
            reason = "there is no C++ compiler; install g++ or clang++"
        required = os.environ.get("DSP_KERNELS_CUDA") == "1"
        if not reason:
            target = Path(self.get_ext_fullpath("dsp_kernels._C")).parent / cuda["LIBRARY"]
            folder = Path(self.build_temp) / "dsp_kernels._C_cuda"
            arguments = self.torch, torch_target(), compiler, os.environ, folder, target
            try:
                cuda["build"](self.spawn, *arguments)
            except Exception as error:
                if required:
                    raise
                reason = f"the build failed ({error})"
            else:
                self.announce_line("built dsp_kernels/_C_cuda.so, the CUDA kernels")
        if reason and required:
            raise SystemExit(f"dsp-kernels: DSP_KERNELS_CUDA is 1, but {reason}")
        if reason:
            self.announce_line(f"building without dsp_kernels/_C_cuda.so (the CUDA kernels): {reason}")

    def announce_line(self, text: str) -> None:
        """One line, easy to find in what `pip install -v` prints; without -v pip shows no build's output."""
        print(f"dsp-kernels: {text}", file=sys.stderr)

    def knows(self, compiler: list[str], name: str, folder: Path) -> bool:
        """Whether the compiler has one of OPTIONAL, and its assembler too."""
        flag, instruction = OPTIONAL[name]
        source = f'void probe() {{ asm("{instruction} %zmm0, %zmm0, %zmm0"); }}'
        command = [*compiler, flag, "-x", "c++", "-c", "-", "-o", str(folder / "probe.o")]
        done = subprocess.run(command, input=source.encode(), capture_output=True, check=False)
        return done.returncode == 0

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        compiler = find_compiler()
        assert compiler is not None
        include = [f"-I{sysconfig.get_paths()['include']}", f"-I{pybind11.get_include()}"]
        folder = Path(self.build_temp) / ext.name
        folder.mkdir(parents=True, exist_ok=True)
        newest_header = max(Path(header).stat().st_mtime for header in ext.depends)
        extra = shlex.split(os.environ.get("CXXFLAGS", ""))
        x86 = platform.machine() in X86_64
        known = [name for name in OPTIONAL if x86 and self.knows(compiler, name, folder)]
        defines = [f"-DDSP_HAS_{name}" for name in known]
        unknown = {OPTIONAL[name][0] for name in OPTIONAL if name not in known}

        def compile_one(source: str) -> str:
            target = folder / (Path(source).stem + ".o")
            newest = max(newest_header, Path(source).stat().st_mtime)
            flags = ISA_FLAGS.get(Path(source).name, []) if x86 else []
            flags = [*defines, *(flag for flag in flags if flag not in unknown)]
            if source == TORCH_SOURCE:
                assert self.torch is not None
                flags = torch_flags(self.torch)
                newest = max(newest, Path(SCHEMA_FILE).stat().st_mtime)
            if self.force or not target.exists() or target.stat().st_mtime < newest:
                self.spawn(
                    [
                        *compiler,
                        *COMMON_FLAGS,
                        *flags,
                        *extra,
                        "-fPIC",
                        *include,
                        "-c",
                        source,
                        "-o",
                        str(target),
                    ]
                )
            return str(target)

        sources = [*ext.sources, *([TORCH_SOURCE] if self.torch else [])]
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, sources))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        link = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        if self.torch:  # already loaded when the extension is, because the package imports torch first
            link += [f"-L{self.torch / 'lib'}", "-ltorch_cpu"]
        temporary = library.with_suffix(".tmp")
        self.spawn([*compiler, "-shared", "-pthread", *extra, *objects, *link, "-o", str(temporary)])
        temporary.replace(library)


X86_64 = ("x86_64", "AMD64")

setup(
    packages=[
        *find_packages(".", include=["dsp_kernels", "dsp_kernels.*"]),
        *find_packages("python"),
        "dsp_benchmarks",
        *(f"dsp_benchmarks.{name}" for name in find_packages("benchmarks")),
    ],
    ext_modules=NATIVE_EXTENSIONS,
    cmdclass={"build_ext": BuildNative},
)
