"""Learn groups, prune, pack: from a dense CNN to small grouped convolutions."""

from dsp_pruning.learn.assign import assign_groups
from dsp_pruning.learn.wrapper import GroupWrapper
from dsp_pruning.packing.pack import pack
from dsp_pruning.packing.unpack import unpack
from dsp_pruning.prune.wrapper import PruneWrapper
from dsp_pruning.released.arrays import build_released, read_released
from dsp_pruning.released.load import load_released

__all__ = [
    "GroupWrapper",
    "PruneWrapper",
    "assign_groups",
    "build_released",
    "load_released",
    "pack",
    "read_released",
    "unpack",
]
