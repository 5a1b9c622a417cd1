"""The emulations of the CUDA kernels on the host, compiled once per session."""

import shutil
import subprocess
from pathlib import Path

import pytest
from emulation import Emulator

SOURCE = Path(__file__).resolve().parent / "emulator" / "emulator.cpp"


@pytest.fixture(scope="session")
def emulator_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the emulation with")
    library = tmp_path_factory.mktemp("emulator") / "emulator.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    return library


@pytest.fixture
def emulator(emulator_library: Path) -> Emulator:
    return Emulator(emulator_library, "cuda_conv")


@pytest.fixture
def block_emulator(emulator_library: Path) -> Emulator:
    return Emulator(emulator_library, "cuda_block")
