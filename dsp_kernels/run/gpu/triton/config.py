"""Which tiles the Triton kernel is compiled for, and the rule that chooses among them.

The rule follows from floors and resource use, not from measurements: no GPU has timed it yet
(docs/gpu-notes.md). ``tune`` (triton_tune.py) measures instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product

import torch

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.gpu.layout import GpuLayout, all_groups

__all__ = ["TritonConfig", "candidates", "choose", "choose_packing", "columns_in_l2", "shipped"]

# Columns of input that programs running together share: a part of the L2 of an A100 (40 MB) or H200 (50 MB).
_L2_BYTES = 16 << 20
# With fewer programs than two for each of 132 multiprocessors, smaller tiles fill the chip better.
_FEW_PROGRAMS = 264
# Numbers of a tile whose sums take 64 registers of each of 128 threads, and what three such programs leave a
# thread: 65,536 / (3 x 128), in eights.
_WIDE, _THREE_PROGRAMS = 64 * 128, 168


@dataclass(frozen=True)
class TritonConfig:
    """Tile sizes of one compiled kernel.

    chwn: the layout. cols: output pixels x images of a tile; images: how many of them are images of one
    pixel (CHWN). filters: filters of a tile. bk: products summed per step. cache: how activations are read,
    "" (past L1) or ".ca" (through L1, where the taps of a kernel meet the same lines again).
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
        """What the kernel is compiled with."""
        return {
            "CHWN": self.chwn,
            "COLS": self.cols,
            "IMAGES": self.images,
            "FILTERS": self.filters,
            "BK": self.bk,
            "CACHE": self.cache,
        }

    def options(self) -> dict[str, int | bool]:
        """How it is compiled. Registers are bound where three programs then still share a multiprocessor.

        Without that bound ptxas of triton 3.6 aims at four of them, 128 registers, and spills eight bytes.
        """
        made: dict[str, int | bool] = {
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": True,
        }
        if self.chwn and self.warps == 4 and self.cols * self.filters >= _WIDE:
            made["maxnreg"] = _THREE_PROGRAMS
        return made

    def to_dict(self) -> dict[str, int | bool | str]:
        """Plain JSON values."""
        return asdict(self)


def choose_packing(spec: ConvSpec, dtype: torch.dtype, layout: GpuLayout, wide: bool) -> tuple[int, int]:
    """(filters, bk) of the tiles, from the groups alone, so that weights are packed once for all inputs.

    A step of a tile reads cols + filters numbers per product row, and padding reads them for nothing; the
    sum of that over all tiles is what the rule makes least.
    """
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    sizes = [(len(g.out_index), len(g.in_index) * taps) for g in all_groups(spec.structure)]

    def moved(filters: int, bk: int) -> int:
        return sum(_up(o, filters) // filters * _up(depth, bk) * (128 + filters) for o, depth in sizes)

    _, widths, depths = _sizes(wide, dtype)
    filters = min(widths, key=lambda width: (moved(width, 1), width))
    # Long steps cost fewer barriers: the longest that pads at most a tenth more than the shortest.
    return filters, max(bk for bk in depths if moved(filters, bk) <= 1.1 * moved(filters, depths[0]))


def choose(
    spec: ConvSpec,
    dtype: torch.dtype,
    layout: GpuLayout,
    wide: bool,
    packing: tuple[int, int],
    batch: int,
    output_hw: tuple[int, int],
) -> TritonConfig:
    """The configuration for one input size. wide: 16-byte reads of the input are possible."""
    filters, bk = packing
    positions = batch * output_hw[0] * output_hw[1]
    n_tiles = sum(-(-len(group.out_index) // filters) for group in all_groups(spec.structure))
    all_cols = _sizes(wide, dtype)[0]
    cols = all_cols[0]
    if positions * n_tiles >= 128 * _FEW_PROGRAMS:
        cols = all_cols[-1]
    return _make(layout, dtype, wide, _is_pointwise(spec), cols, filters, bk, batch)


def candidates(
    spec: ConvSpec, dtype: torch.dtype, layout: GpuLayout, wide: bool, batch: int, output_hw: tuple[int, int]
) -> list[TritonConfig]:
    """What ``tune`` measures, the rule's own choice first; at most 12."""
    packing = choose_packing(spec, dtype, layout, wide)
    first = choose(spec, dtype, layout, wide, packing, batch, output_hw)
    all_cols, widths, _ = _sizes(wide, dtype)
    found = [first]
    found += [
        _make(layout, dtype, wide, _is_pointwise(spec), cols, filters, first.bk, batch)
        for filters in (first.filters, first.filters // 2, first.filters * 2)
        for cols in all_cols
        if filters in widths
    ]
    found += [replace(first, stages=stages) for stages in (2, 5)]
    if layout is GpuLayout.CHWN:
        found.append(replace(first, cache="" if first.cache else ".ca"))
        found += [replace(first, images=n) for n in (16, 64) if batch % n == 0 and n <= first.cols]
    return list(dict.fromkeys(found))[:12]


def shipped() -> Iterator[tuple[str, TritonConfig, torch.dtype, dict[str, object]]]:
    """Every configuration that the rule can choose, at batch 256: (name, configuration, dtype, flags)."""
    for layout, wide in ((GpuLayout.CHWN, True), (GpuLayout.NHWC, True), (GpuLayout.NHWC, False)):
        kind = layout.name if wide else f"{layout.name} by channel"
        flags: dict[str, object] = {"WIDE_IN": False, "WIDE_OUT": False}
        if layout is GpuLayout.NHWC:
            flags = {"WIDE_IN": wide, "WIDE_OUT": wide}
        for dtype in (torch.float16, torch.float32):
            for pointwise in (False, True) if dtype == torch.float16 else (False,):
                name = f"{kind} {'1x1' if pointwise else 'k x k'}"
                for cols, filters, bk in product(*_sizes(wide, dtype)):
                    config = _make(layout, dtype, wide, pointwise, cols, filters, bk, 256)
                    yield name, config, dtype, {**flags, "POINTWISE": pointwise}


def _sizes(wide: bool, dtype: torch.dtype) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Columns, filters and depths of tiles that the rule chooses among."""
    if dtype == torch.float32:
        return (64,), (16, 32), (16,)
    return ((64, 128), (16, 32, 64, 128), (32, 64)) if wide else ((64,), (16, 32), (32,))


def _make(
    layout: GpuLayout,
    dtype: torch.dtype,
    wide: bool,
    pointwise: bool,
    cols: int,
    filters: int,
    bk: int,
    batch: int,
) -> TritonConfig:
    chwn = layout is GpuLayout.CHWN
    warps = 8 if cols * filters >= 128 * 128 else 4
    # Three stages are one step of the table and one of activations ahead; four make no difference. Many
    # small programs on a multiprocessor keep more under way than few deep ones, and leave more of L1.
    stages = 3
    most = cols if pointwise else 32
    images = min(most, batch & -batch) if chwn else 1
    return TritonConfig(
        chwn, cols, images, filters, bk, warps, stages, ".ca" if chwn and not pointwise else ""
    )


def columns_in_l2(config: TritonConfig, spec: ConvSpec, itemsize: int) -> int:
    """How many column tiles of input a part of L2 holds."""
    per_tile = config.cols * spec.structure.in_channels * spec.stride[0] * spec.stride[1] * itemsize
    return max(1, _L2_BYTES // per_tile)


def _is_pointwise(spec: ConvSpec) -> bool:
    return spec.kernel_size == (1, 1)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
