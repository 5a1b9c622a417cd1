"""What an installation builds, or why not, as a Markdown table: with nvcc and a CUDA torch, in minutes.

python scripts/build_table.py [--only TEXT]
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# As pip runs it without isolation, after a change that hides something.
SETUP = """import runpy, shutil, sys
{change}
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", "{folder}", "--build-temp", "{folder}/temp"]
runpy.run_path("setup.py", run_name="__main__")"""
HIDE = (
    "which = shutil.which; shutil.which = lambda name, **more: None if {!r} in name else which(name, **more)"
)
# Says that it is of another CUDA.
WRAPPER = """#!/bin/sh
[ "$1" = --version ] && exec echo "Cuda compilation tools, release 99.0, V99.0.1"
exec nvcc "$@"
"""
# In a process of its own: a process can load one such library.
ASK = """import ctypes, sys, torch
build = ctypes.CDLL(sys.argv[1]).dsp_kernels_build
build.restype = ctypes.c_char_p
print(build().decode())"""
START = "dsp-kernels: "
ONLY_CUDA = {"DSP_KERNELS_CPU": "0"}
# Name -> (change, environment); None: by pip, isolated, where torch is missing.
ROWS: dict[str, tuple[str | None, dict[str, str]]] = {
    "`pip install .`": (None, {}),
    "without isolation": ("", {}),
    "nvcc of another CUDA than torch's": ("", {"CUDACXX": "{folder}/nvcc", **ONLY_CUDA}),
    "without nvcc": (HIDE.format("nvcc"), ONLY_CUDA),
    "without a compiler": ("", {"CXX": "no-such-compiler"}),
} | {
    f"TORCH_CUDA_ARCH_LIST={arch}": ("", {"TORCH_CUDA_ARCH_LIST": arch, **ONLY_CUDA})
    for arch in ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
}


def build(change: str | None, environment: dict[str, str], folder: Path) -> tuple[list[str], list[str]]:
    """(what the build says, the libraries with their architectures)."""
    (folder / "nvcc").write_text(WRAPPER, encoding="utf-8")
    (folder / "nvcc").chmod(0o755)
    code = SETUP.format(change=change, folder=folder)
    pip = ["-m", "pip", "wheel", "-v", "--no-deps", "-w", str(folder), str(ROOT)]
    command = [sys.executable, *(pip if change is None else ("-c", code))]
    variables = {name: value.format(folder=folder) for name, value in environment.items()}
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    lines = map(str.strip, (done.stdout + done.stderr).splitlines())
    said = [line.removeprefix(START) for line in lines if line.startswith(START) and "CPU is 0" not in line]
    for wheel in folder.glob("*.whl"):
        subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, folder], check=True)
    return said, [about(file) for file in sorted(folder.rglob("_C*.so"))]


def about(library: Path) -> str:
    """Its name, and what it says it was built for."""
    name = library.name.partition(".")[0]
    command = [sys.executable, "-c", ASK, str(library)]
    return name if name == "_C" else f"{name}: {subprocess.check_output(command, text=True).strip()}"


def main() -> None:
    """Print a row for each way of installing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    only = parser.parse_args().only
    print("| installed | built | said | seconds |\n|---|---|---|---:|")
    for name, row in ROWS.items():
        if only in name:
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                said, made = build(*row, Path(folder))
            cells = (
                name,
                ", ".join(made) or "nothing",
                "; ".join(said),
                f"{time.perf_counter() - started:.0f}",
            )
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
