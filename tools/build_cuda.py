"""Building dsp_kernels/_C_cuda.so: whether it is possible here, for which GPUs, and how. Run by setup.py.

The library does not depend on Python and uses torch through its stable ABI, so one build serves every
version of Python and every torch from 2.10 on.
"""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
LIBRARY = "_C_cuda.so"
OLDEST_TORCH = (2, 10)
OLDEST_ARCH = (8, 0)
# For a machine without a GPU: A100, RTX 30, RTX 40, H100/H200, B200, RTX 50. Apart from wgmma the kernels use
# nothing newer than sm_80, so all other GPUs compile the PTX of 8.0.
ALL_ARCHS = "8.0+PTX;8.6;8.9;9.0;10.0;12.0"
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


def cuda_version(nvcc: str) -> str:
    """The version of CUDA that nvcc belongs to, such as 13.0; empty if it does not say."""
    match = re.search(r"release (\d+\.\d+)", _output(nvcc, "--version"))
    return match[1] if match else ""


def wanted_archs(environment: Mapping[str, str], nvcc: str) -> str:
    """TORCH_CUDA_ARCH_LIST, else those of this machine's GPUs, else ALL_ARCHS, as far as nvcc knows them."""
    if listed := environment.get("TORCH_CUDA_ARCH_LIST"):
        return listed
    known = _output(nvcc, "--list-gpu-arch").split()
    present = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader").split()

    def of_nvcc(archs: Iterable[str]) -> list[str]:
        names = {arch: f"compute_{arch.removesuffix('+PTX').replace('.', '')}" for arch in archs}
        return [arch for arch, name in names.items() if name in known]

    return ";".join(of_nvcc(present) or of_nvcc(ALL_ARCHS.split(";")))


def _output(*command: str) -> str:
    """What a command prints; empty if it does not run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def arch_flags(archs: str) -> list[str]:
    """nvcc's flags for a list like TORCH_CUDA_ARCH_LIST ("8.0 9.0+PTX"); GPUs before 8.0 are left out.

    9.0 means 9.0a: all GPUs of that capability have wgmma. Raises ValueError if an entry is not understood
    or none is left.
    """
    flags = []
    for entry in re.split(r"[;, ]+", archs.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if not match:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST has {entry!r}; expected numbers like 8.0 or 9.0+PTX")
        major, minor, feature, ptx = match.groups()
        if (int(major), int(minor)) < OLDEST_ARCH:
            continue
        number = major + minor
        name = "90a" if number == "90" else number + feature
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if ptx:  # of the plain architecture: that of 90a would run on 9.0 only
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    if not flags:
        raise ValueError(f"the GPUs to build for are of {archs!r}; the CUDA kernels need 8.0 or newer")
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
    nvcc = find_nvcc(environment)
    if nvcc is None:
        return "there is no nvcc; install the CUDA toolkit or set CUDA_HOME"
    # nvcc's CUDA runtime becomes part of the library; a driver for torch's may be too old for a newer one.
    version = re.search(
        r"^cuda\b.*'(\d+)\.", (torch / "version.py").read_text(encoding="utf-8"), re.MULTILINE
    )
    major, found = version[1] if version else "", cuda_version(nvcc)
    if major != found.partition(".")[0]:
        return f"{nvcc} is of CUDA {found}, torch of CUDA {major}; set CUDA_HOME to a toolkit of CUDA {major}"
    try:
        arch_flags(wanted_archs(environment, nvcc))
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
) -> str:
    """Compile sources newer than their objects and link ``target``; spawn runs one command or raises.

    Returns what the library says of itself: the version of CUDA, then the architectures.
    """
    nvcc = find_nvcc(environment)
    assert nvcc is not None
    archs = arch_flags(wanted_archs(environment, nvcc))
    about = " ".join([cuda_version(nvcc), *(flag.rpartition("code=")[2] for flag in archs)])
    temporary.mkdir(parents=True, exist_ok=True)
    headers = [*CUDA.glob("*.h"), *CUDA.glob("*.cuh"), Path(__file__)]
    newest_header = max(path.stat().st_mtime for path in headers)
    host = [
        *compiler,
        *CXX_FLAGS,
        TARGET_FLAG,
        f"-isystem{torch / 'include'}",
        f'-DDSP_KERNELS_BUILD="{about}"',
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
    return about
