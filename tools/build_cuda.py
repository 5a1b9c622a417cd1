"""Building dsp_kernels/_C_cuda.so: whether it is possible here, for which GPUs, and how. Run by setup.py.

The library does not depend on Python and uses torch through its stable ABI, so one build serves every
version of Python and every torch from 2.10 on.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
LIBRARY = "_C_cuda.so"
OLDEST_TORCH = (2, 10)
# Machine code for A100 and H100/H200; newer GPUs compile the PTX on first use.
DEFAULT_ARCHS = "8.0+PTX;9.0a"
OLDEST_ARCH = (8, 0)
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "--threads", "2", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
CXX_FLAGS = ["-std=c++17", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]
CXX_FLAGS += ["-Wno-unknown-pragmas"]
# Compile for the stable ABI of the oldest torch that the library must load on.
TARGET_FLAG = f"-DTORCH_TARGET_VERSION={OLDEST_TORCH[0] << 56 | OLDEST_TORCH[1] << 48:#x}ULL"


def find_torch() -> tuple[Path | None, str]:
    """The folder of a torch whose headers can be compiled against, or None and the reason."""
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


def find_nvcc(environment: Mapping[str, str]) -> str | None:
    """CUDACXX, else nvcc of CUDA_HOME or CUDA_PATH, of PATH (may be a wrapper), or of /usr/local/cuda."""
    homes = [environment.get("CUDA_HOME"), environment.get("CUDA_PATH")]
    wanted = [environment.get("CUDACXX"), *(f"{home}/bin/nvcc" for home in homes if home), "nvcc"]
    path = environment.get("PATH", os.defpath)
    found = (shutil.which(name, path=path) for name in [*wanted, "/usr/local/cuda/bin/nvcc"] if name)
    return next((name for name in found if name), None)


def arch_flags(archs: str) -> list[str]:
    """nvcc's flags for a list like TORCH_CUDA_ARCH_LIST ("8.0 9.0a+PTX"); GPUs before 8.0 are left out.

    Raises ValueError if an entry is not understood or none is left.
    """
    flags = []
    for entry in re.split(r"[;, ]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {entry!r}; expected numbers like 8.0 or 9.0a+PTX")
        major, minor, feature, ptx = match.groups()
        if (int(major), int(minor)) < OLDEST_ARCH:
            continue
        name = f"{major}{minor}{feature}"
        codes = f"sm_{name},compute_{name}" if ptx else f"sm_{name}"
        flags.append(f"-gencode=arch=compute_{name},code=[{codes}]")
    if not flags:
        raise ValueError(f"TORCH_CUDA_ARCH_LIST is {archs!r}; the CUDA kernels need 8.0 or newer")
    return flags


def why_not_cuda(environment: Mapping[str, str], torch: Path | None, without_torch: str) -> str:
    """Why the library cannot or must not be built here; empty if it can.

    torch, without_torch: the result of find_torch.
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


def build(
    spawn: Callable[[list[str]], None],
    torch: Path,
    compiler: Sequence[str],
    environment: Mapping[str, str],
    temporary: Path,
    target: Path,
) -> None:
    """Compiles sources newer than their objects and links ``target``; spawn runs one command or raises."""
    nvcc = find_nvcc(environment)
    assert nvcc is not None
    archs = arch_flags(environment.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS)
    temporary.mkdir(parents=True, exist_ok=True)
    headers = [*CUDA.glob("*.h"), *CUDA.glob("*.cuh"), Path(__file__)]
    newest_header = max(path.stat().st_mtime for path in headers)
    has_wgmma = int(any("arch=compute_90a" in flag for flag in archs))
    host = [
        *compiler,
        *CXX_FLAGS,
        TARGET_FLAG,
        f"-isystem{torch / 'include'}",
        f"-DDSP_KERNELS_WGMMA={has_wgmma}",
    ]

    def compile_one(source: Path) -> str:
        object_file, stamp = (temporary / (source.stem + suffix) for suffix in (".o", ".command"))
        command = host if source.suffix == ".cpp" else [nvcc, *NVCC_FLAGS, *archs]
        command = [*command, "-c", str(source), "-o", str(object_file)]
        newest = max(newest_header, source.stat().st_mtime)
        known = stamp.read_text(encoding="utf-8") if stamp.exists() else ""
        if not object_file.exists() or object_file.stat().st_mtime < newest or known != repr(command):
            spawn(command)
            stamp.write_text(repr(command), encoding="utf-8")
        return str(object_file)

    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, sorted([*CUDA.glob("*.cu"), *CUDA.glob("*.cpp")])))
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(".tmp")
    # torch's libraries are already loaded when this one is, because the package imports torch first.
    link = ["-shared", "-cudart", "static", f"-L{torch / 'lib'}", "-ltorch_cpu", "-ltorch_cuda"]
    spawn([nvcc, *objects, *link, "-o", str(unfinished)])
    unfinished.replace(target)
