"""The schema of the torch op. It stands here and nowhere else; setup.py reads it for the native build."""

from __future__ import annotations

__all__ = ["NAMESPACE", "OP_NAME", "SCHEMA"]

NAMESPACE = "dsp_kernels"
OP_NAME = "gather_grouped_conv2d"
SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor[] in_index, Tensor[] out_index, Tensor? bias, Tensor? residual, "
    "SymInt out_channels, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "str activation) -> Tensor"
)
