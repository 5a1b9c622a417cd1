"""The machine and the software behind a measurement, written into every result file."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

# Two results are comparable if these are equal.
MACHINE_KEYS = ("processor", "cores", "threads", "cpu_capability", "accelerator", "device")
_PACKAGES = ("dsp-kernels", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt", "triton")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Plain JSON: time, versions, commit, processor, threads, and the accelerator if it is used."""
    found: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: number for name in _PACKAGES if (number := _version(name))},
        "commit": _commit(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
    }
    if torch.device(device).type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
        found["cuda"] = str(torch.version.cuda)
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        found["driver"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Of the working tree that this code runs from; "+" if tracked files are modified."""
    here = str(Path(__file__).resolve().parents[1])
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    modified = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return commit + "+" * bool(commit and modified)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
