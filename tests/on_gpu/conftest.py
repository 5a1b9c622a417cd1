"""Tests that need a GPU: ``scripts/gpu_check.sh`` runs them; elsewhere they are skipped with the reason."""

import os

import pytest
import torch


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        # scripts/gpu_check.sh must not pass without a GPU.
        (pytest.fail if os.environ.get("DSP_REQUIRE_GPU") else pytest.skip)("torch finds no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())
