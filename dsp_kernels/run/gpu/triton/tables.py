"""The tables that the Triton kernel reads: what every k stands for, which tile is what, where filters go.

They come from a checked structure and depend on neither the input's size nor the numbers, so they are made
once per convolution and tile size, and packing weights is one gather on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import Group
from dsp_kernels.run.gpu.layout import GpuLayout, all_groups

__all__ = ["MOST_CHANNELS", "MOST_DX", "MOST_DY", "TritonTables", "reads_runs", "tables_for", "writes_runs"]

# An entry of the k table holds channel, dy and dx in 16, 8 and 7 bits; a negative one is padding.
MOST_CHANNELS, MOST_DY, MOST_DX = 1 << 16, 255, 127
# Channels that stay together for all taps (NHWC): 128 bytes of 16-bit numbers.
_TOGETHER = 64
_RUN = 8

Array = NDArray[np.int64]


@dataclass(frozen=True)
class TritonTables:
    """int32 tensors on one device.

    k: (sum of padded depths,), entries dx << 24 | dy << 16 | channel, in pixels of the input.
    tiles: (tiles, 3), heaviest first: first step in k, steps, first step in the packed weights.
    filters: (tiles * filters per tile,), output channel or -1.
    weight_index: (steps of all tiles * bk * filters,), into all weights flattened and one zero behind them.
    bias_index: (tiles * filters per tile,), into the bias and one zero behind it.
    """

    k: Tensor
    tiles: Tensor
    filters: Tensor
    weight_index: Tensor
    bias_index: Tensor

    @property
    def n_tiles(self) -> int:
        """Programs per column tile."""
        return self.tiles.shape[0]


def reads_runs(spec: ConvSpec) -> bool:
    """Whether every group reads aligned runs of 8 channels, in order, of a multiple of 8 (NHWC: 16 bytes)."""
    return spec.structure.in_channels % _RUN == 0 and all(
        _in_runs(group.in_index) for group in spec.structure.groups
    )


def writes_runs(spec: ConvSpec) -> bool:
    """The same for the output channels, the absent ones included."""
    return spec.structure.out_channels % _RUN == 0 and all(
        _in_runs(group.out_index) for group in all_groups(spec.structure)
    )


def _in_runs(index: tuple[int, ...]) -> bool:
    if len(index) % _RUN:
        return False
    runs = np.asarray(index, dtype=np.int64).reshape(-1, _RUN)
    return bool((runs[:, 0] % _RUN == 0).all() and (runs == runs[:, :1] + np.arange(_RUN)).all())


@lru_cache(maxsize=256)
def tables_for(
    spec: ConvSpec, layout: GpuLayout, filters: int, bk: int, device: torch.device
) -> TritonTables:
    """filters, bk: the tile. The same arguments give the same tables."""
    groups = all_groups(spec.structure)
    live = len(spec.structure.groups)
    zero_weight, zero_bias = spec.structure.params(spec.kernel_size), spec.structure.out_channels
    k_parts: list[Array] = []
    tiles: list[tuple[int, int, Array, Array, Array]] = []
    k_step = weight_start = 0
    for number, group in enumerate(groups):
        order, entries = _reduction(spec, group, layout)
        depth = len(order)
        steps = -(-depth // bk)
        k_parts.append(_padded(entries, steps * bk, -1))
        written = np.asarray(group.out_index, dtype=np.int64)
        for start in range(0, len(written), filters):
            here = written[start : start + filters]
            rows = weight_start + np.arange(start, start + len(here)) * depth
            index = np.full((steps * bk, filters), zero_weight, dtype=np.int64)
            index[:depth, : len(here)] = rows[None, :] + order[:, None]
            bias = _padded(here if number < live else here[:0], filters, zero_bias)
            tiles.append((k_step, steps, _padded(here, filters, -1), index, bias))
        k_step += steps
        weight_start += len(written) * depth
    tiles.sort(key=lambda tile: -tile[1])
    first_weight = np.cumsum([0, *(tile[1] for tile in tiles)])
    rows = np.asarray([(tile[0], tile[1], first) for tile, first in zip(tiles, first_weight, strict=False)])

    def on_device(parts: list[Array]) -> Tensor:
        # A kernel never gets an empty table.
        joined = np.concatenate(parts) if sum(map(len, parts)) else np.full(bk, -1)
        return torch.from_numpy(joined.astype(np.int32)).to(device)

    with torch.inference_mode(False):
        return TritonTables(
            on_device(k_parts),
            on_device([rows]),
            on_device([tile[2] for tile in tiles]),
            torch.from_numpy(np.concatenate([tile[3].ravel() for tile in tiles]).astype(np.int32)).to(device),
            on_device([tile[4] for tile in tiles]),
        )


def _reduction(spec: ConvSpec, group: Group, layout: GpuLayout) -> tuple[Array, Array]:
    """Positions in a filter's weights (C_g, kh, kw) in the order in which they are summed, and k's entries.

    CHWN: the taps of a channel follow each other, so that they find its lines in L1. NHWC: the channels of
    a tap do, because they lie together.
    """
    kh, kw = spec.kernel_size
    together = 1 if layout is GpuLayout.CHWN else _TOGETHER
    position = np.arange(len(group.in_index) * kh * kw).reshape(len(group.in_index), kh * kw)
    parts = [position[at : at + together].T.ravel() for at in range(0, len(position), together)]
    order = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    channels = np.asarray(group.in_index, dtype=np.int64)
    dy = order % (kh * kw) // kw * spec.dilation[0]
    dx = order % kw * spec.dilation[1]
    return order, channels[order // (kh * kw)] | dy << 16 | dx << 24


def _padded(values: Array, length: int, filler: int) -> Array:
    padded = np.full(length, filler, dtype=np.int64)
    padded[: len(values)] = values
    return padded
