"""The CUDA kernels' templates on the host."""

from pathlib import Path

import pytest
from compiled import cuda_emulator, why_no_compiler
from emulation import Emulator


@pytest.fixture(scope="session")
def emulator_library() -> Path:
    if reason := why_no_compiler():
        pytest.skip(reason)
    return cuda_emulator()


@pytest.fixture
def emulator(emulator_library: Path) -> Emulator:
    return Emulator(emulator_library, "cuda_conv")


@pytest.fixture
def block_emulator(emulator_library: Path) -> Emulator:
    return Emulator(emulator_library, "cuda_block")
