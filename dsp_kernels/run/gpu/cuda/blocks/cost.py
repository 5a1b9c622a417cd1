"""Predicted cost of a residual block as one kernel and as one kernel per convolution.

**Every constant here is an estimate or from a data sheet, except where it says measured.** The model counts
what each multiprocessor has to do (bytes from L2, bytes through shared memory, multiply-adds including
padding, halo pixels computed twice) and what the GPU's memory has to move; the slowest of these is the
time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dsp_kernels.program.steps import ConvStep
from dsp_kernels.run.gpu.cuda.blocks.geometry import BlockGeometry
from dsp_kernels.run.gpu.cuda.blocks.step import BlockStep
from dsp_kernels.run.gpu.cuda.blocks.tables import STEP, STEP_CLOCKS, BlockTables
from dsp_kernels.run.gpu.layout import BATCH_MULTIPLE, all_groups

Shapes = Mapping[str, tuple[int, ...] | None]
_BYTES = 2  # per number: the kernel is for 16-bit dtypes only
_WARPS = 8  # per thread block; csrc/cuda/block_kernel.cuh
# Seconds per turn, and per kernel, outside the model: latency of the first copy, barriers, the last store. An
# estimate.
_LATENCY = 1e-6
# Clocks of a warp per step, however idle the others are. An estimate.
_STEP_LATENCY = 64
# Clocks of a warp per work item besides its steps (addresses, bias, activation, stores). An estimate.
_ITEM_CLOCKS = 120


@dataclass(frozen=True)
class DeviceModel:
    """A GPU in bytes, bytes per second, operations per second (2 per multiply-add) and seconds per launch.

    flops: of mma.sync; peak_flops: of the fastest instructions, for the floor.
    """

    multiprocessors: int
    shared_per_block: int
    shared_per_multiprocessor: int
    bandwidth: float
    l2_bandwidth: float
    flops: float
    peak_flops: float
    clock: float
    launch: float
    shared_per_clock: int = 128  # bytes per multiprocessor, including L1


# bandwidth, peak_flops: measured on an H200 before the project (docs/notes/gpu.md); multiprocessors,
# clock and shared memory: data sheet; launch in a CUDA graph, l2_bandwidth and flops of mma.sync: estimates.
H200 = DeviceModel(132, 232448, 233472, 4.3e12, 5.5e12, 6.0e14, 7.9e14, 1.7e9, 2.5e-6)


def device_model(device: torch.device) -> DeviceModel:
    """The GPU's own multiprocessors and shared memory with the rates of an H200; H200 for a CPU."""
    if device.type != "cuda":
        return H200
    found = torch.cuda.get_device_properties(device)
    return replace(
        H200,
        multiprocessors=found.multi_processor_count,
        shared_per_block=found.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        shared_per_multiprocessor=found.shared_memory_per_multiprocessor,
    )


def _moved(step: BlockStep | ConvStep, shapes: Shapes) -> int:
    """Bytes that one kernel must read and write at least."""
    convs = step.members if isinstance(step, BlockStep) else (step,)
    weights = sum(weight.numel() for conv in convs for weight in conv.weights)
    values = sum(math.prod(shapes[name] or ()) for name in {*step.inputs, step.output})
    return _BYTES * (values + weights)


def block_floor(step: BlockStep, shapes: Shapes, device: DeviceModel) -> float:
    """Lower bound in seconds of one kernel for the block; formula of benchmarks/measure/floors.py."""
    flops = 0
    for conv in step.members:
        batch, _, height, width = shapes[conv.output] or (0, 0, 0, 0)
        flops += 2 * batch * conv.spec.structure.macs(conv.spec.kernel_size, (height, width))
    return max(flops / device.peak_flops, _moved(step, shapes) / device.bandwidth) + device.launch


def conv_seconds(step: ConvStep, shapes: Shapes, device: DeviceModel) -> float:
    """Predicted seconds of one convolution as its own kernel (csrc/cuda/halo_conv.cuh, chwn_gemm.cuh)."""
    spec = step.spec
    batch, _, height, width = shapes[step.output] or (0, 0, 0, 0)
    taps = spec.kernel_size[0] * spec.kernel_size[1]
    has_halo = spec.kernel_size == (3, 3) and (spec.stride, spec.dilation) == ((1, 1), (1, 1))
    # A halo tile reads 1.9 times its pixels instead of 9 times (docs/notes/gpu.md).
    reread = 1.9 / 9 if has_halo else 1.0
    positions = batch * height * width
    best = math.inf
    for filters in (16, 32, 64):
        rows = flops = 0
        for group in all_groups(spec.structure):
            tiles = math.ceil(len(group.out_index) / filters)
            reduction = STEP * math.ceil(len(group.in_index) * taps / STEP)
            rows += tiles * reduction
            flops += 2 * tiles * reduction * filters
        l2 = _BYTES * positions * rows * reread + _moved(step, shapes) / 2
        shared = _BYTES * positions * rows * (1 + reread)
        staging = shared / (device.shared_per_clock * device.clock * device.multiprocessors)
        best = min(best, max(l2 / device.l2_bandwidth, staging, positions * flops / device.flops))
    return max(best + _LATENCY, _moved(step, shapes) / device.bandwidth) + device.launch


def block_seconds(
    tables: BlockTables, geometry: BlockGeometry, shapes: Shapes, device: DeviceModel
) -> float | None:
    """Predicted seconds of a block as one kernel in this geometry; None where it does not fit the device."""
    step, filters = tables.step, tables.filters
    # Two by registers; each thread block reserves 1024 more bytes of shared memory.
    resident = min(2, device.shared_per_multiprocessor // (geometry.shared_bytes + 1024))
    if geometry.shared_bytes > device.shared_per_block or resident == 0:
        return None
    batch, channels, height, width = shapes[step.output] or (0, 0, 0, 0)
    chunks, tile_n, turns = batch // BATCH_MULTIPLE, geometry.tile_n, geometry.turns
    output = geometry.regions[-1]
    blocks = math.ceil(height / (output.rows * turns)) * math.ceil(width / output.columns)
    blocks *= math.ceil(chunks / tile_n)

    m_tiles, n_tiles = filters // 16, 8
    # Rows of the first turn and of every other one.
    rows = [(region.rows, region.rows - region.kept) for region in geometry.regions[:-1]]
    rows.append((output.rows, output.rows))
    across = [region.columns * tile_n for region in geometry.regions]
    pieces = [
        (first + (turns - 1) * more) * columns for (first, more), columns in zip(rows, across, strict=True)
    ]
    # Eight images are half a sector of L2.
    sectors = 2 if tile_n == 1 and chunks > 1 else 1
    l2 = 16 * sectors * (pieces[0] * len(tables.channels) + pieces[-1] * channels)
    l2 += 16 * sectors * pieces[-1] * channels * (len(step.inputs) == 2)
    work = path = 0.0
    for tiles, (first, more), columns in zip(tables.tiles, rows[1:], across[1:], strict=True):
        steps = [(len(tile.rows) + len(tile.second_rows)) // STEP for tile in tiles]
        for count, times in ((first, 1), (more, turns - 1)):
            groups = math.ceil(count * columns / n_tiles)
            l2 += times * 512 * m_tiles * sum(steps) * math.ceil(groups / _WARPS)
            per_group = sum(steps) * STEP_CLOCKS[filters] + len(tiles) * m_tiles * _ITEM_CLOCKS / _WARPS
            work += times * groups * per_group
            path += times * _longest(steps, groups) * _STEP_LATENCY
    kept = sum(
        region.slots * region.kept * columns
        for region, columns in zip(geometry.regions[:-1], across, strict=False)
    )
    work += (turns - 1) * 2 * 16 * kept / device.shared_per_clock
    computing = work / device.clock
    copying = l2 * device.multiprocessors / device.l2_bandwidth
    alone = copying + max(work, path) / device.clock + turns * _LATENCY
    # Blocks that are resident together overlap: one copies while the other computes.
    busy = math.ceil(blocks / device.multiprocessors) * max(copying, computing, alone / resident)
    return max(busy, alone, _moved(step, shapes) / device.bandwidth) + device.launch


def _longest(steps: Sequence[int], groups: int) -> float:
    """Upper bound of the steps of one warp: items (a tile for a group of chunks) go round-robin to warps."""
    longest = max(steps, default=0)
    return longest if len(steps) * groups <= _WARPS else sum(steps) * groups / _WARPS + longest
