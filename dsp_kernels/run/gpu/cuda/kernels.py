"""The CUDA kernels of convolutions, in the order of csrc/cuda/params.h, and which of them can run what."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from dsp_kernels.op.structure import GroupStructure
from dsp_kernels.run.gpu.layout import GpuLayer, GpuLayout, all_groups, round_up

# Offsets of taps, heights and widths are packed into 16 bits (csrc/cuda/params.h).
LARGEST_SIDE = 16383
# The tap of a padding row of the reduction: outside of every image (csrc/cuda/params.h).
OUTSIDE = 0x7FFF << 16


@dataclass(frozen=True)
class KernelKind:
    """One kernel.

    filters: the sizes of its tiles. rows: of the reduction per step; the channels of one tap are padded to a
    multiple of ``channels``. order: of the weights of a tile, see WEIGHT_ORDERS.
    """

    name: str
    filters: tuple[int, ...]
    rows: int
    channels: int = 1
    order: str = "fragments"

    @property
    def has_halo(self) -> bool:
        """Whether it stages blocks of 16 channels with their halo, and reads all taps from there."""
        return self.name in ("halo", "wgmma_halo")

    @property
    def gathers_runs(self) -> bool:
        """Whether it reads eight channels at once where they are an aligned run (16-bit NHWC)."""
        return self.name in ("nhwc", "nhwc_sliced")

    def reduction(self, channels: int, taps: int) -> int:
        """Rows of the reduction, with padding."""
        return round_up(round_up(channels, self.channels) * taps, self.rows)


_NHWC = KernelKind("nhwc", (16, 32), 32, 8)
KERNELS = {
    kind.name: kind
    for kind in (
        KernelKind("chwn", (16, 32, 64), 32),
        KernelKind("halo", (16, 32, 64), 9 * 16, 16),
        _NHWC,
        KernelKind("fp32_chwn", (32,), 16, order="rows"),
        KernelKind("fp32_nhwc", (32,), 16, order="rows"),
        KernelKind("wgmma", (64, 128), 32, order="cores"),
        KernelKind("wgmma_halo", (64,), 9 * 16, 16, order="cores"),
        replace(_NHWC, name="nhwc_sliced"),  # four warps share the reduction of a tile
    )
}


def kernels_for(layer: GpuLayer, wgmma: bool) -> tuple[str, ...]:
    """Names of the kernels that can run a convolution. wgmma: whether the device has it.

    Where nothing is measured, the first one runs, or the second where the first has too few thread blocks.
    """
    spec = layer.spec
    if layer.dtype == torch.float32:
        return (f"fp32_{layer.layout.name.lower()}",)
    if layer.layout is GpuLayout.NHWC:
        return "nhwc", "nhwc_sliced"
    if spec.kernel_size == (3, 3) and spec.stride == spec.dilation == (1, 1):
        return ("halo", "chwn", "wgmma", "wgmma_halo") if wgmma else ("halo", "chwn")
    return ("chwn", "wgmma") if wgmma else ("chwn",)


# Positions (pixels x images) of a thread block of the first kernels of ``kernels_for``, with 32 filters.
_POSITIONS = {"halo": 512, "nhwc": 64}
# Thread blocks below which an H200 (132 multiprocessors) is not full.
_FEW_BLOCKS = 132


def rule(names: Sequence[str], structure: GroupStructure, positions: int) -> str:
    """The kernel of ``kernels_for`` for so many positions where nothing is measured. An estimate."""
    tiles = sum(-(-len(group.out_index) // 32) for group in all_groups(structure))
    is_full = positions * tiles >= _FEW_BLOCKS * _POSITIONS.get(names[0], 0)
    return names[:2][0 if is_full else -1]
