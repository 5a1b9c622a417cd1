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

__all__ = ["MACHINE_KEYS", "environment"]

# Two files are comparable where these agree.
MACHINE_KEYS = ("processor", "cores", "threads", "cpu_capability", "accelerator", "device")
_PACKAGES = ("dsp-kernels", "numpy", "onnx", "onnxruntime", "openvino", "tensorrt", "triton")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Plain JSON: time, versions, commit, processor and its clocks, threads, and the accelerator if used."""
    found: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: number for name in _PACKAGES if (number := _version(name))},
        "commit": _commit(),
        "platform": platform.platform(),
        "processor": _cpuinfo("model name") or platform.processor(),
        "clock_mhz": _cpuinfo("cpu MHz"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
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
    """Of the working tree that this code runs from; "+" where tracked files differ from it."""
    here = str(Path(__file__).resolve().parents[1])
    commit = _output("git", "-C", here, "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return commit + "+" * bool(commit and changed)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _cpuinfo(field: str) -> str:
    lines = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith(field)]
    return lines[0].split(":", 1)[1].strip() if lines else ""
