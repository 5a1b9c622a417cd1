"""Run pruned, multi-branch CNNs at the speed their FLOPs promise."""

from dsp_kernels.errors import DSPError
from dsp_kernels.fuse import FusedNetwork, fuse
from dsp_kernels.ops import gather_grouped_conv2d
from dsp_kernels.packed import PackedConv2d
from dsp_kernels.structure import Group, GroupStructure

__version__ = "0.1.0"
