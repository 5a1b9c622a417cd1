"""Run pruned, multi-branch CNNs at the speed their FLOPs promise."""

from dsp_kernels.architectures import register_architecture
from dsp_kernels.errors import DSPError
from dsp_kernels.fuse import FusedNetwork, fuse
from dsp_kernels.fused_conv import FusedConv2d
from dsp_kernels.ops import gather_grouped_conv2d
from dsp_kernels.packed import PackedConv2d
from dsp_kernels.serialization import load, save
from dsp_kernels.structure import Group, GroupStructure
from dsp_kernels.swap import swap

__version__ = "0.1.0"

__all__ = [
    "DSPError",
    "FusedConv2d",
    "FusedNetwork",
    "Group",
    "GroupStructure",
    "PackedConv2d",
    "fuse",
    "gather_grouped_conv2d",
    "load",
    "register_architecture",
    "save",
    "swap",
]
