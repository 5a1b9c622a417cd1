"""Tests that need a GPU: ``scripts/gpu_check.sh`` runs them; elsewhere they are skipped with the reason.

DSP_DEVICE=cpu rehearses the table of single convolutions in Triton's interpreter.
"""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    if os.environ.get("DSP_DEVICE") == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        # scripts/gpu_check.sh must not pass without a GPU.
        (pytest.fail if os.environ.get("DSP_REQUIRE_GPU") else pytest.skip)("torch finds no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def gpu(device: torch.device) -> torch.device:
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    return device
