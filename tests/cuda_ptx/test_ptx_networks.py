"""Whole networks by the GPU executor on the CPU: every convolution and block is a kernel's PTX."""

import os
from pathlib import Path

import pytest
import torch
from child import Child
from golden import golden_labels
from ptx_checks import released_network

from dsp_kernels.tolerances import network_tolerance

# 64 take minutes.
IMAGES = int(os.environ.get("DSP_TEST_IMAGES", "8"))


@pytest.mark.shared
@pytest.mark.parametrize("wanted", ["one block", "wgmma"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_released_network_on_real_images(
    dtype: torch.dtype, wanted: str, shared: Path, child: Child
) -> None:
    got, expected, kernels = child(released_network, shared, "resnet20_g4", IMAGES, dtype, wanted)
    assert torch.equal(got.argmax(1), expected.argmax(1))
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= network_tolerance(dtype, 600, 20)
    labels = golden_labels(shared)[:IMAGES]
    right = [int((logits.argmax(1) == labels).sum()) for logits in (got, expected)]
    print(f"{IMAGES} images, right {right[0]}, float32 {right[1]}; error {error:.1e}; {dict(kernels)}")
    # 21 convolutions; a block kernel runs two or three of them.
    launches = kernels.total() * 8 // IMAGES
    assert launches < 15 if wanted == "one block" else launches == 21
