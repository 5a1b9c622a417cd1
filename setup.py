"""Packages and native extensions; everything else stands in pyproject.toml."""

from __future__ import annotations

from setuptools import Extension, find_packages, setup

# Native extensions, one entry each. None yet: every operation runs in plain PyTorch.
NATIVE_EXTENSIONS: list[Extension] = []

setup(
    packages=[
        *find_packages(".", include=["dsp_kernels", "dsp_kernels.*"]),
        *find_packages("python"),
        "dsp_benchmarks",
        *(f"dsp_benchmarks.{name}" for name in find_packages("benchmarks")),
    ],
    ext_modules=NATIVE_EXTENSIONS,
)
