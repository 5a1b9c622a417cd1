"""Weights and tables of one convolution in the order in which the CUDA kernels read them (csrc/cuda).

A *tile* is up to ``filters`` filters of one group and the list of their inputs. One launch runs all tiles
of all groups, the longest reduction first. Small groups share a tile where that is less work: the weights
of channels that a filter does not read are then zero, as in a dense convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dsp_kernels.op.spec import ConvSpec
from dsp_kernels.run.gpu.cuda.groups import (
    WEIGHT_ORDERS,
    FilterGroup,
    bias_per_channel,
    groups_of,
    in_runs,
    is_run,
    join_groups,
)
from dsp_kernels.run.gpu.cuda.kernels import OUTSIDE, KernelKind
from dsp_kernels.run.gpu.cuda.launch import KERNEL_CODES, ConvSizes
from dsp_kernels.run.gpu.layout import ACTIVATION_CODES, GpuLayer, round_up


@dataclass(frozen=True)
class Tables:
    """What one launch reads besides x.

    weights: 1-D, dtype of x; bias: (tile_count * filters,) float32; table: int32: tiles, rows, runs, taps,
    gather. sizes: of the launch, 0 where they depend on x.
    """

    weights: Tensor
    bias: Tensor
    table: Tensor
    sizes: ConvSizes


def make_tables(kind: KernelKind, layer: GpuLayer) -> Tables:
    """Arranges the weights of a convolution for one kernel."""
    spec = layer.spec
    groups = groups_of(spec, layer.weights)
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    filters, groups = min(
        ((count, _merged(groups, kind, count, taps)) for count in kind.filters),
        key=lambda choice: _work(choice[1], kind, choice[0], taps),
    )
    writer = _Writer(kind, spec, filters)
    for group in groups:
        writer.add(group)
    return writer.finish(bias_per_channel(spec, layer.bias), layer.dtype, layer.device)


def _tile_work(outputs: int, channels: int, kind: KernelKind, filters: int, taps: int) -> int:
    """Work of a group, in rows of the reduction times filters.

    Estimates, not measured: the activations of a row cost as much as 48 filters, because they go through
    shared memory for any number of filters, and the outputs of a tile as much as 16 rows.
    """
    tiles = -(-outputs // filters)
    return tiles * (kind.reduction(channels, taps) + 16) * (filters + 48)


def _work(groups: Sequence[FilterGroup], kind: KernelKind, filters: int, taps: int) -> int:
    return sum(_tile_work(len(group.out_index), len(group.in_index), kind, filters, taps) for group in groups)


def _merged(groups: Sequence[FilterGroup], kind: KernelKind, filters: int, taps: int) -> list[FilterGroup]:
    """Neighbouring groups joined where that is less work."""
    bins: list[list[FilterGroup]] = []
    reads: set[int] = set()
    writes = 0
    for group in groups:
        both, outputs = reads | set(group.in_index), writes + len(group.out_index)
        apart = _tile_work(writes, len(reads), kind, filters, taps) + _tile_work(
            len(group.out_index), len(group.in_index), kind, filters, taps
        )
        if bins and _tile_work(outputs, len(both), kind, filters, taps) <= apart:
            bins[-1].append(group)
            reads, writes = both, outputs
        else:
            bins.append([group])
            reads, writes = set(group.in_index), len(group.out_index)
    return [join_groups(members) for members in bins]


class _Writer:
    """Collects tiles and writes their tables, the longest reduction first."""

    def __init__(self, kind: KernelKind, spec: ConvSpec, filters: int) -> None:
        self.kind, self.spec, self.filters = kind, spec, filters
        self.taps: list[Tensor] = []  # int32, flat
        self.entries = 0  # in taps so far; a Pair is one entry
        self.gather: list[int] = []
        # steps of the reduction, first entry of taps, output channels (-1: none), packed weights
        self.tiles: list[tuple[int, int, list[int], Tensor]] = []

    def add(self, group: FilterGroup) -> None:
        structure = self.spec.structure
        if self.kind.gathers_runs:
            group = in_runs(group, structure.in_channels, structure.out_channels)
        first = self.entries
        rows = self._write_taps(group.in_index)
        weight = self._by_row(group.weight, rows)
        for start in range(0, len(group.out_index), self.filters):
            outputs = list(group.out_index[start : start + self.filters])
            padded = F.pad(weight[start : start + self.filters], (0, 0, 0, self.filters - len(outputs)))
            outputs = _filled(outputs, self.filters)
            packed = WEIGHT_ORDERS[self.kind.order](padded)
            self.tiles.append((rows // self.kind.rows, first, outputs, packed))

    def _by_row(self, weight: Tensor, rows: int) -> Tensor:
        """weight: (filters, channels, taps) -> (filters, rows) in the order of the kernel's reduction."""
        outputs, channels, taps = weight.shape
        filled = F.pad(weight, (0, 0, 0, round_up(channels, self.kind.channels) - channels))
        if self.kind.has_halo:  # (block of 16 channels, tap, channel)
            ordered = filled.view(outputs, -1, 16, taps).transpose(2, 3).reshape(outputs, -1)
        else:  # (tap, channel)
            ordered = filled.transpose(1, 2).reshape(outputs, -1)
        return F.pad(ordered, (0, rows - ordered.shape[1]))

    def _write_taps(self, channels: Sequence[int]) -> int:
        """Append the entries of one group; returns the rows of its reduction."""
        (kh, kw), (dy, dx) = self.spec.kernel_size, self.spec.dilation
        rows = self.kind.reduction(len(channels), kh * kw)
        if self.kind.has_halo:
            entries = torch.tensor(_filled(channels, 16), dtype=torch.int32)
            self.entries += len(entries)
            self.taps.append(entries)
            return rows
        offsets = torch.tensor([y * dy << 16 | x * dx for y in range(kh) for x in range(kw)])
        if self.kind.gathers_runs:
            firsts, count = torch.tensor(self._octets(channels), dtype=torch.long), rows // 8
        else:
            firsts, count = torch.tensor(channels, dtype=torch.long), rows
        pairs = torch.tensor([[0, OUTSIDE]]).repeat(count, 1)
        used = len(firsts) * kh * kw
        pairs[:used, 0] = firsts.repeat(kh * kw)
        pairs[:used, 1] = offsets.repeat_interleave(len(firsts))
        self.entries += count
        self.taps.append(pairs.to(torch.int32).reshape(-1))
        return rows

    def _octets(self, channels: Sequence[int]) -> list[int]:
        """First channel of each aligned run of eight, or -1 - (index of its eight channels in gather)."""
        filled, firsts = _filled(channels, 8), []
        for start in range(0, len(filled), 8):
            octet = filled[start : start + 8]
            if is_run(octet, self.spec.structure.in_channels):
                firsts.append(octet[0])
            else:
                firsts.append(-1 - len(self.gather) // 8)
                self.gather += octet
        return firsts

    def finish(self, bias: Tensor, dtype: torch.dtype, device: torch.device) -> Tables:
        tiles = sorted(self.tiles, key=lambda tile: -tile[0])
        records, rows, start = [], [], 0
        for blocks, first, outputs, packed in tiles:
            unit = packed.numel() * dtype.itemsize // 16
            records += [start, blocks, first, 0]
            rows += outputs
            start += unit
        runs = [
            octet[0] if is_run(octet, self.spec.structure.out_channels) else -1
            for octet in (rows[i : i + 8] for i in range(0, len(rows), 8))
        ]
        # Filters are multiples of 16, so every part is 8-byte aligned.
        parts = [torch.tensor(part, dtype=torch.int32) for part in (records, rows, runs)]
        parts += [torch.cat([*self.taps, torch.zeros(0, dtype=torch.int32)])]
        rows_at, runs_at, taps_at, gather_at = torch.tensor([len(part) for part in parts]).cumsum(0).tolist()
        parts.append(torch.tensor(self.gather, dtype=torch.int32))
        index = torch.tensor(rows, dtype=torch.long)
        row_bias = torch.where(index >= 0, bias[index.clamp(min=0)], 0.0)
        spec = self.spec
        sizes = ConvSizes(
            kernel=KERNEL_CODES[self.kind.name],
            filters=self.filters,
            tile_count=len(tiles),
            rows_at=rows_at,
            runs_at=runs_at,
            taps_at=taps_at,
            gather_at=gather_at,
            stride_y=spec.stride[0],
            stride_x=spec.stride[1],
            pad_y=spec.padding[0],
            pad_x=spec.padding[1],
            activation=ACTIVATION_CODES[spec.activation],
            in_channels=spec.structure.in_channels,
            out_channels=spec.structure.out_channels,
            **dict.fromkeys(("batch", "height", "width", "out_height", "out_width"), 0),
        )
        return Tables(
            torch.cat([packed for *_, packed in tiles]).to(device, dtype),
            row_bias.to(device),
            torch.cat(parts).to(device),
            sizes,
        )


def _filled(channels: Sequence[int], multiple: int) -> list[int]:
    return [*channels, *[-1] * (round_up(len(channels), multiple) - len(channels))]
