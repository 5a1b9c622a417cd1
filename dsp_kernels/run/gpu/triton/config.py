"""The tile sizes of the Triton kernel, and the rule that chooses among them.

The rule is derived from lower bounds and resource use, not measured on a GPU yet (docs/notes/gpu.md).
DSP_KERNELS_TUNE=all measures instead (gpu/tune.py).
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.gpu.layout import GpuLayout, all_groups, round_up

# Input columns shared by concurrent programs: a part of the L2 of an A100 (40 MB) or H200 (50 MB).
_L2_BYTES = 16 << 20
# With fewer than two programs for each of 132 multiprocessors, smaller tiles fill the GPU better.
_FEW_PROGRAMS = 264
# Outputs of a tile whose sums take 64 registers of each of 128 threads, and the registers per thread with
# which three such programs fit a multiprocessor: 65,536 / (3 x 128), rounded down to a multiple of 8.
_WIDE, _THREE_PROGRAMS = 64 * 128, 168


@dataclass(frozen=True)
class TritonConfig:
    """Tile sizes of one compiled kernel.

    chwn: the layout. cols: output pixels x images of a tile; images: how many of them are images of one
    pixel (CHWN). filters: filters of a tile. bk: products summed per step. cache: cache modifier of input
    loads: "" bypasses L1, ".ca" uses it, so that the taps of a kernel hit the same lines.
    """

    chwn: bool
    cols: int
    images: int
    filters: int
    bk: int
    warps: int
    stages: int
    cache: str = ""

    def constants(self) -> dict[str, object]:
        names = "chwn", "cols", "images", "filters", "bk", "cache"
        return {name.upper(): getattr(self, name) for name in names}

    def options(self) -> dict[str, int | bool]:
        """Compiler options. The registers of wide tiles are limited so that three programs fit.

        Without the limit, ptxas of triton 3.6 aims at four (128 registers) and spills eight bytes.
        """
        made = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        if self.chwn and self.warps == 4 and self.cols * self.filters >= _WIDE:
            made["maxnreg"] = _THREE_PROGRAMS
        return made


@dataclass(frozen=True)
class TileRule:
    """Chooses the tiles of a convolution. wide: whether its input can be read in pieces of 16 bytes."""

    spec: ConvSpec
    dtype: torch.dtype
    layout: GpuLayout
    wide: bool

    @cached_property
    def packing(self) -> tuple[int, int]:
        """(filters, bk) of the tiles, from the groups alone, so that weights are packed once for all inputs.

        A step of a tile reads cols + filters numbers per row of the product, including padding; the rule
        minimises their sum over all tiles.
        """
        taps = self.spec.kernel_size[0] * self.spec.kernel_size[1]
        sizes = [(len(g.out_index), len(g.in_index) * taps) for g in all_groups(self.spec.structure)]

        def moved(filters: int, bk: int) -> int:
            return sum(
                round_up(o, filters) // filters * round_up(depth, bk) * (128 + filters) for o, depth in sizes
            )

        _, widths, depths = tile_sizes(self.wide, self.dtype)
        filters = min(widths, key=lambda width: (moved(width, 1), width))
        # Longer steps need fewer barriers: the longest with at most a tenth more padding than the shortest.
        return filters, max(bk for bk in depths if moved(filters, bk) <= 1.1 * moved(filters, depths[0]))

    def choose(self, batch: int, output_hw: tuple[int, int]) -> TritonConfig:
        """The configuration for one input size."""
        filters, bk = self.packing
        positions = batch * output_hw[0] * output_hw[1]
        n_tiles = sum(-(-len(group.out_index) // filters) for group in all_groups(self.spec.structure))
        all_cols = tile_sizes(self.wide, self.dtype)[0]
        return self._of(all_cols[-1 if positions * n_tiles >= 128 * _FEW_PROGRAMS else 0], filters, bk, batch)

    def candidates(self, batch: int, output_hw: tuple[int, int]) -> list[TritonConfig]:
        """The configurations that may be the fastest, at most 12; the rule's choice is first."""
        first = self.choose(batch, output_hw)
        all_cols, widths, _ = tile_sizes(self.wide, self.dtype)
        found = [first]
        found += [
            self._of(cols, filters, first.bk, batch)
            for filters in (first.filters, first.filters // 2, first.filters * 2)
            for cols in all_cols
            if filters in widths
        ]
        found += [replace(first, stages=stages) for stages in (2, 5)]
        if first.chwn:
            found.append(replace(first, cache="" if first.cache else ".ca"))
            found += [replace(first, images=n) for n in (16, 64) if batch % n == 0 and n <= first.cols]
        return list(dict.fromkeys(found))[:12]

    def _of(self, cols: int, filters: int, bk: int, batch: int) -> TritonConfig:
        return config_of(self.layout, self.spec.kernel_size == (1, 1), cols, filters, bk, batch)


def tile_sizes(wide: bool, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """(cols, filters, bk) among which the rule chooses."""
    if dtype == torch.float32:
        return (64,), (16, 32), (16,)
    return ((64, 128), (16, 32, 64, 128), (32, 64)) if wide else ((64,), (16, 32), (32,))


def config_of(
    layout: GpuLayout, pointwise: bool, cols: int, filters: int, bk: int, batch: int
) -> TritonConfig:
    """The configuration of a tile size. pointwise: for 1x1 kernels."""
    chwn = layout is GpuLayout.CHWN
    warps = 8 if cols * filters >= 128 * 128 else 4
    # Three stages prefetch one step of the table and one of activations; a fourth makes no difference. Many
    # small programs per multiprocessor keep more loads in flight than few deep ones, and leave more of L1.
    stages = 3
    images = min(cols if pointwise else 32, batch & -batch) if chwn else 1
    cache = ".ca" if chwn and not pointwise else ""
    return TritonConfig(chwn, cols, images, filters, bk, warps, stages, cache)


def columns_in_l2(config: TritonConfig, spec: ConvSpec, itemsize: int) -> int:
    """The number of column tiles of input that fit into the part of L2."""
    per_tile = config.cols * spec.structure.in_channels * spec.stride[0] * spec.stride[1] * itemsize
    return max(1, _L2_BYTES // per_tile)
