"""A fused network under those who record operations instead of running them."""

from __future__ import annotations

import nets
import torch

import dsp_kernels


def test_can_be_traced_compiled_and_exported() -> None:
    """Whoever records operations sees PyTorch's own."""
    model, x = nets.make("residual"), nets.example(seed=3)
    fused = dsp_kernels.fuse(model, nets.example())
    with torch.no_grad():
        expected = model(x)
        for recorded in (
            torch.jit.trace(fused, nets.example(), check_trace=False),
            torch.compile(fused, fullgraph=True),
            torch.export.export(fused, (nets.example(),)).module(),
        ):
            torch.testing.assert_close(recorded(x), expected, rtol=1e-4, atol=1e-5)
