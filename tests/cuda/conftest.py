"""The emulation of the CUDA kernels on the host, compiled once per session."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from emulation import Emulator

FOLDER = Path(__file__).resolve().parent / "emulator"


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the emulation with")
    library = tmp_path_factory.mktemp("emulator") / "emulator.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(FOLDER / "emulator.cpp"), "-o", str(library)], check=True)
    return Emulator(library)
