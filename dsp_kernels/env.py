"""The environment for a bug report: ``python -m dsp_kernels.env``."""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = (
    *("dsp-kernels", "torch", "torchvision", "triton", "numpy", "safetensors"),
    *("onnx", "onnxruntime", "openvino", "nncf", "tensorrt"),
)


def describe_environment() -> dict[str, str]:
    """Name -> value, as text, of what decides which kernels run and how fast."""
    from dsp_kernels.run.convs import BACKENDS
    from dsp_kernels.run.cpu.extension import chosen_isa, native, product_dtype, why_missing
    from dsp_kernels.run.gpu.cuda.library import built_for, why_no_cuda
    from dsp_kernels.run.programs import EXECUTORS

    missing = why_no_cuda()
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    fast = [str(dtype) for dtype in (torch.bfloat16, torch.float16) if product_dtype(dtype) == dtype]
    built = "" if missing else f"CUDA {built_for()[0]}: {' '.join(built_for()[1])}"

    found = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "cores": str(os.cpu_count()),
        "torch threads": str(torch.get_num_threads()),
        "cuda": torch.version.cuda or "none: this torch was built without CUDA",
        "driver": driver or "none: nvidia-smi does not run; install NVIDIA's driver",
        "gpu": _gpu(),
        "nvcc": _nvcc(),
        "c compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or "none",
        "backends": ", ".join(BACKENDS.names()),
        "native kernels": why_missing() if native() is None else chosen_isa(),
        "16-bit products": ", ".join(fast) or "none: DSP_KERNELS_PRODUCTS=16bit for those of this CPU",
        "cuda kernels": missing or built,
        "executors": ", ".join(EXECUTORS.names()),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def cpu_model() -> str:
    """Its name, as the system tells it."""
    from dsp_kernels.run.cpu.extension import cpu_fact

    return cpu_fact("model name") or platform.processor() or platform.machine()


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none: torch finds no CUDA device (nvidia-smi and CUDA_VISIBLE_DEVICES show why)"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}"


def _nvcc() -> str:
    found = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    version = re.search(r"release ([\d.]+)", _output(found, "--version"))
    return version[1] if version else "none: without the CUDA toolkit the CUDA kernels cannot be built here"


def _output(*command: str) -> str:
    """What a command prints; empty if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def main() -> None:
    """Print the environment, one line each."""
    for name, value in describe_environment().items():
        print(f"{name:<16} {value}")


if __name__ == "__main__":
    main()
