"""What needs a GPU. ``scripts/gpu_check.sh`` runs it; elsewhere every test here skips with the reason.

With DSP_DEVICE=cpu and TRITON_INTERPRET=1 the table of single convolutions is rehearsed in Triton's
interpreter.
"""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU, or the CPU for a rehearsal."""
    if os.environ.get("DSP_DEVICE") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        # The script that is there to check a GPU must not pass without one.
        (pytest.fail if os.environ.get("DSP_REQUIRE_GPU") else pytest.skip)("torch finds no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    """The GPU; skips in a rehearsal."""
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device
