"""What an installation builds, or why not, as a Markdown table: with nvcc and a CUDA torch, in minutes.

python scripts/build_table.py [TEXT]: only rows whose name contains it
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# As pip runs it without isolation, with nvcc hidden or not.
SETUP = """import runpy, shutil, sys
which = shutil.which
shutil.which = lambda name, **more: None if {hidden!r} in name else which(name, **more)
sys.argv = ["setup.py", "-q", "build_ext", "--build-lib", "{folder}", "--build-temp", "{folder}/temp"]
runpy.run_path("setup.py", run_name="__main__")"""
# Says that it is of another CUDA.
WRAPPER = """#!/bin/sh
[ "$1" = --version ] && exec echo "Cuda compilation tools, release 99.0, V99.0.1"
exec nvcc "$@"
"""
ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# Name -> environment. Where the CPU kernels do not matter they are left out.
ROWS: dict[str, dict[str, str]] = {
    "`pip install .`": {},
    "without isolation": {},
    "nvcc of another CUDA than torch's": {"CUDACXX": "{folder}/nvcc", "DSP_KERNELS_CPU": "0"},
    "without nvcc": {"DSP_KERNELS_CPU": "0"},
    "without a compiler": {"CXX": "no-such-compiler"},
} | {f"for {arch}": {"TORCH_CUDA_ARCH_LIST": arch, "DSP_KERNELS_CPU": "0"} for arch in ARCHS}


def build(name: str, folder: str) -> tuple[str, str]:
    """(the libraries and what they were built for, what the build says)."""
    wrapper = Path(folder, "nvcc")
    wrapper.write_text(WRAPPER, encoding="utf-8")
    wrapper.chmod(0o755)
    command = [sys.executable, "-c", SETUP.format(hidden=name.removeprefix("without "), folder=folder)]
    if "pip" in name:
        command = [sys.executable, "-m", "pip", "install", "-v", "--no-deps", "--target", folder, "."]
    variables = {name: value.format(folder=folder) for name, value in ROWS[name].items()}
    options = {"cwd": ROOT, "env": os.environ | variables, "stderr": subprocess.STDOUT, "text": True}
    lines = re.findall(r"^\s*dsp-kernels: (.*)", subprocess.check_output(command, **options), re.MULTILINE)
    said = [line for line in lines if "CPU is 0" not in line]
    made = []
    for library in sorted(Path(folder, "dsp_kernels").glob("_C*.so")):
        about = re.search(rb"\d+\.\d+(?: (?:sm|compute)_\w+)+", library.read_bytes())
        made.append(library.name.partition(".")[0] + (f": CUDA {about[0].decode()}" if about else ""))
    return ", ".join(made) or "nothing", "; ".join(said)


def main() -> None:
    """Print a row for each way of installing."""
    print("| installed | built | said | seconds |\n|---|---|---|---:|")
    for name in ROWS:
        if "".join(sys.argv[1:]) in name:
            started = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                cells = build(name, folder)
            print(f"| {name} | {' | '.join(cells)} | {time.perf_counter() - started:.0f} |", flush=True)


if __name__ == "__main__":
    main()
