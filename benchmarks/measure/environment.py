"""The machine and the software behind a measurement, written into every result file."""

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from dsp_kernels.env import describe_environment

# Two results are comparable if these are equal.
MACHINE_KEYS = ("processor", "cores", "threads", "cpu_capability", "accelerator", "device")
_PACKAGES = ("dsp-kernels", "numpy", "onnx", "onnxruntime", "openvino", "nncf", "tensorrt", "triton")


def environment(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Plain JSON: time, versions, commit, processor, threads, and the accelerator if it is used."""
    about = describe_environment()
    found: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": about["python"],
        "torch": torch.__version__,
        "packages": {name: about[name] for name in _PACKAGES if about[name] != "not installed"},
        "commit": _commit(),
        "platform": about["platform"],
        "processor": about["cpu"],
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "cpu_capability": about["cpu capability"],
        "device": str(device),
    }
    if torch.device(device).type == "cuda":
        found["accelerator"] = torch.cuda.get_device_name(device)
        found["cuda"] = about["cuda"]
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
        found["driver"] = _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    return found


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
