"""Learn groups, prune, pack: from a dense CNN to small grouped convolutions."""

from dsp_pruning.groups import GroupWrapper
from dsp_pruning.packing import pack
from dsp_pruning.pruning import PruneWrapper
from dsp_pruning.released import build_released, read_released
from dsp_pruning.torchscript_import import load_released
from dsp_pruning.unpacking import unpack

__all__ = [
    "GroupWrapper",
    "PruneWrapper",
    "build_released",
    "load_released",
    "pack",
    "read_released",
    "unpack",
]
