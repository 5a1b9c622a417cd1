"""The emulations of the CUDA kernels on the host, each compiled once per session."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from block_emulation import BlockEmulator
from emulation import Emulator

FOLDER = Path(__file__).resolve().parent / "emulator"


def compiled(source: str, folder: Path) -> Path:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no g++ to compile the emulation with")
    library = folder / "emulator.so"
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(FOLDER / source), "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(compiled("emulator.cpp", tmp_path_factory.mktemp("emulator")))


@pytest.fixture(scope="session")
def block_emulator(tmp_path_factory: pytest.TempPathFactory) -> BlockEmulator:
    return BlockEmulator(compiled("block_emulator.cpp", tmp_path_factory.mktemp("emulator")))
