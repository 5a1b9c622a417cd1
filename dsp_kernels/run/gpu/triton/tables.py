"""The tables of the Triton kernel: channel and tap of every k, the tiles, and the outputs of their filters.

They depend on the structure and the tile size only, so that they are made once, and packing weights is one
gather on the device.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.op.structure import Group
from dsp_kernels.run.gpu.layout import GpuLayout, all_groups

# An entry of the k table packs channel, dy and dx into 16, 8 and 7 bits; negative entries are padding.
MOST_CHANNELS, MOST_DY, MOST_DX = 1 << 16, 255, 127
_CHANNEL_BLOCK = 64  # channels per tap in NHWC before the next tap: 128 bytes of 16-bit numbers
_RUN = 8

Array = NDArray[np.int64]


@dataclass(frozen=True)
class TritonTables:
    """int32 tensors on one device.

    k: (sum of padded depths,), entries dx << 24 | dy << 16 | channel, in pixels of the input.
    tiles: (tiles, 3), most steps first: first step in k, steps, first step in the packed weights.
    filters: (tiles * filters per tile,), output channel or -1.
    weight_index: (steps of all tiles * bk * filters,), into the concatenation of all weights and one zero.
    bias_index: (tiles * filters per tile,), into the concatenation of the bias and one zero.
    """

    k: Tensor
    tiles: Tensor
    filters: Tensor
    weight_index: Tensor
    bias_index: Tensor


def reads_runs(spec: ConvSpec) -> bool:
    """Whether every group reads whole aligned runs of 8 channels (16 bytes in NHWC)."""
    return spec.structure.in_channels % _RUN == 0 and all(
        _in_runs(group.in_index) for group in spec.structure.groups
    )


def writes_runs(spec: ConvSpec) -> bool:
    """The same for the output channels, including absent ones."""
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
    """The tables for tiles of ``filters`` filters and steps of ``bk``."""
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
        # Not empty, so that the kernel gets a valid pointer.
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
    """Positions in a filter's weights (C_g, kh, kw) in the order of summation, and their entries of k.

    CHWN: all taps of a channel, whose cache lines are then in L1. NHWC: _CHANNEL_BLOCK channels of a tap,
    which are contiguous.
    """
    kh, kw = spec.kernel_size
    block = 1 if layout is GpuLayout.CHWN else _CHANNEL_BLOCK
    position = np.arange(len(group.in_index) * kh * kw).reshape(len(group.in_index), kh * kw)
    parts = [position[at : at + block].T.ravel() for at in range(0, len(position), block)]
    order = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
    channels = np.asarray(group.in_index, dtype=np.int64)
    dy = order % (kh * kw) // kw * spec.dilation[0]
    dx = order % kw * spec.dilation[1]
    return order, channels[order // (kh * kw)] | dy << 16 | dx << 24


def _padded(values: Array, length: int, filler: int) -> Array:
    padded = np.full(length, filler, dtype=np.int64)
    padded[: len(values)] = values
    return padded
