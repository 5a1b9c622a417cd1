"""Run pruned, multi-branch CNNs at the speed their FLOPs promise."""

from dsp_kernels.errors import DSPError
from dsp_kernels.file.save_load import load, save
from dsp_kernels.op.fused_conv import FusedConv2d
from dsp_kernels.op.packed import PackedConv2d
from dsp_kernels.op.structure import Group, GroupStructure
from dsp_kernels.op.torch_op import gather_grouped_conv2d
from dsp_kernels.program.fuse import FusedNetwork, fuse
from dsp_kernels.program.swap import swap
from dsp_kernels.quantizing.network import QuantizedNetwork, quantize

__version__ = "0.1.0"

__all__ = [
    "DSPError",
    "FusedConv2d",
    "FusedNetwork",
    "Group",
    "GroupStructure",
    "PackedConv2d",
    "QuantizedNetwork",
    "fuse",
    "gather_grouped_conv2d",
    "load",
    "quantize",
    "save",
    "swap",
]
