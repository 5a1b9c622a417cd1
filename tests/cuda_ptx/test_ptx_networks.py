"""Whole networks by the GPU executor on the CPU: every convolution and block is a kernel's PTX."""

from pathlib import Path

import pytest
import torch
from child import Child
from ptx_checks import released_network

from dsp_kernels.tolerances import network_tolerance


@pytest.mark.shared
@pytest.mark.parametrize(("wgmma", "blocks"), [(False, True), (True, False)], ids=["blocks", "wgmma"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_a_released_network_on_real_images(
    dtype: torch.dtype, wgmma: bool, blocks: bool, shared: Path, child: Child
) -> None:
    got, expected, kernels = child(released_network, shared, "resnet20_g4", 8, dtype, wgmma, blocks)
    assert torch.equal(got.argmax(1), expected.argmax(1))
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= network_tolerance(dtype, 600, 20)
    # 21 convolutions; a block kernel runs two or three of them.
    assert kernels.total() == 21 if not blocks else kernels.total() < 15
