"""The environment for a bug report: ``python -m dsp_kernels.env``."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

_PACKAGES = (
    *("dsp-kernels", "torch", "torchvision", "triton", "numpy", "safetensors"),
    *("onnx", "onnxruntime", "openvino", "tensorrt"),
)


def describe_environment() -> dict[str, str]:
    """Name -> value, as text, of what decides which kernels run and how fast."""
    from dsp_kernels.run.convs import BACKENDS
    from dsp_kernels.run.cpu.extension import chosen_isa, native, why_missing
    from dsp_kernels.run.programs import EXECUTORS

    found = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "cuda": torch.version.cuda or "none",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "backends": ", ".join(BACKENDS.names()),
        "native kernels": why_missing() if native() is None else chosen_isa(),
        "executors": ", ".join(EXECUTORS.names()),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def main() -> None:
    """Print the environment, one line each."""
    for name, value in describe_environment().items():
        print(f"{name:<16} {value}")


if __name__ == "__main__":
    main()
