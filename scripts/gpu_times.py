"""Time every convolution or residual block of networks on a GPU, beside its floor.

    python scripts/gpu_times.py layers --out FILE [--net NAME ...] [--batch N ...] [--dtype D] [--kernels K]
    python scripts/gpu_times.py blocks --out FILE [--net NAME ...] [--batch N ...] [--dtype D]

A time is one launch, replayed from a CUDA graph, on tensors that rotate among more copies than the L2 cache
can hold, as in a network, where a layer reads what was written long ago. Every variant of a block that fits
is timed, also those that the planner would not choose: these times are there to calibrate its constants.
"""

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from dsp_benchmarks.measure.floors import part_floor
from dsp_benchmarks.measure.peaks import Peaks, measure_peaks
from dsp_benchmarks.subjects.networks import NetworkSource, load_network
from torch import Tensor

from dsp_kernels.env import describe_environment
from dsp_kernels.program.steps import ConvStep, Program
from dsp_kernels.run.gpu.conv import GPU_KERNELS
from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock, why_no_blocks
from dsp_kernels.run.gpu.cuda.blocks.cost import device_model
from dsp_kernels.run.gpu.cuda.blocks.plan import best_geometry, plan_blocks, variants
from dsp_kernels.run.gpu.cuda.blocks.step import residual_last
from dsp_kernels.run.gpu.cuda.blocks.tables import block_tables
from dsp_kernels.run.gpu.graphs import capture
from dsp_kernels.run.gpu.layout import GpuConv, GpuLayout, layout_for_batch
from dsp_kernels.whole_file import write_text

CACHE_BYTES = 128 << 20  # twice the L2 cache of an H200
MOST_COPIES = 32
LAUNCHES, REPLAYS = 20, 50  # launches per graph; the median of the replays is taken
NETWORKS = {
    "layers": ["resnet56_g4", "resnet18_g2_80", "resnet50_g2_80"],
    "blocks": ["resnet20_g4", "resnet18_g2_80", "resnet50_g2_80"],
}
BATCHES = {"layers": [1, 32, 256], "blocks": [32, 256]}  # of blocks: multiples of 8

Row = dict[str, Any]


def layer_times(
    program: Program, batch: int, dtype: torch.dtype, peaks: Peaks, device: torch.device, kernels: str
) -> Iterator[Row]:
    """One row per convolution."""
    layout = layout_for_batch(batch)
    for step in program.steps:
        if not isinstance(step, ConvStep):
            continue
        family = GPU_KERNELS.choose(kernels, step.spec, dtype, device, layout)
        moved = step.map_tensors(lambda tensor: tensor.to(device, dtype))
        conv = family.prepare(step.spec, moved.weights, moved.bias, layout)
        shapes = [(batch, *program.shapes[name][1:]) for name in (*step.inputs, step.output)]
        seconds = replayed_seconds(conv, shapes, layout, dtype, device)
        floor = part_floor(program, [step], batch, peaks, dtype)
        yield {
            "layer": step.output,
            "what": step.describe(),
            "kernels": family.name,
            "layout": layout.name,
            "batch": batch,
            "seconds": seconds,
            "floor": floor,
            "fraction": floor / seconds,
        }


def block_times(
    program: Program, batch: int, dtype: torch.dtype, peaks: Peaks, device: torch.device
) -> Iterator[Row]:
    """One row per residual block and variant: as one kernel, and the sum of its convolutions' kernels."""
    if reason := why_no_blocks(dtype, device, layout_for_batch(batch)):
        raise SystemExit(f"blocks cannot run as one kernel: {reason}")
    program = residual_last(program)
    shapes = {name: (batch, *shape[1:]) for name, shape in program.shapes.items()}
    layers = layer_times(program, batch, dtype, peaks, device, "cuda")
    single = {row["layer"]: row["seconds"] for row in layers}
    model = device_model(device)
    for plan in plan_blocks(program, shapes, model):
        for step in variants(plan.block):
            chosen = plan.step is not None and plan.step.members == step.members
            step = step.map_tensors(lambda tensor: tensor.to(device, dtype))
            tables = block_tables(step, dtype, device)
            found = best_geometry(tables, shapes, model)
            if found is None:
                continue
            geometry, predicted = found
            values = [shapes[name] for name in (*step.inputs, step.output)]
            block = CudaBlock(step, tables, geometry)
            seconds = replayed_seconds(block, values, GpuLayout.CHWN, dtype, device)
            output = geometry.regions[-1]
            floor = part_floor(program, list(step.members), batch, peaks, dtype)
            yield {
                "block": plan.block.output,
                "what": step.describe(),
                "batch": batch,
                "seconds": seconds,
                "per_conv": sum(single[member.output] for member in step.members),
                "floor": floor,
                "predicted": predicted,
                "predicted_per_conv": plan.per_conv,
                "chosen": chosen,
                "tile": (output.rows, output.columns, 8 * geometry.tile_n),
                "turns": geometry.turns,
                "filters": tables.filters,
                "shared_bytes": geometry.shared_bytes,
                "fraction": floor / seconds,
            }


def replayed_seconds(
    conv: GpuConv,
    shapes: Sequence[tuple[int, ...]],
    layout: GpuLayout,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Of one launch. shapes (batch, channels, height, width): of x, of the residual if any, of the output."""
    size = sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
    copies: list[list[Tensor]] = [
        [torch.randn(layout.shape(shape), device=device).to(dtype) for shape in shapes]
        for _ in range(max(2, min(MOST_COPIES, -(-CACHE_BYTES // size))))
    ]

    def launch_all() -> None:
        for number in range(LAUNCHES):
            x, *residual, out = copies[number % len(copies)]
            conv(x, out, *residual)

    replay = capture(launch_all, device, None)
    if replay is None:
        raise SystemExit("this convolution cannot be captured in a CUDA graph")
    replay()
    taken = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        taken.append(1e-3 * start.elapsed_time(end) / LAUNCHES)
    return statistics.median(taken)


def main() -> None:
    """Write one JSON file; print one line per network and batch, or per block."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("layers", "blocks"))
    parser.add_argument("--net", nargs="+")
    parser.add_argument("--batch", nargs="+", type=int)
    parser.add_argument("--kernels", default="auto", help="of layers")
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(f"{options.what} are timed on a GPU: torch finds no CUDA device")
    dtype, device = getattr(torch, options.dtype), torch.device("cuda", torch.cuda.current_device())
    peaks = measure_peaks("cuda", (dtype,))
    found: list[Row] = []
    for name in options.net or NETWORKS[options.what]:
        program = load_network(NetworkSource(name)).program("packed")
        for batch in options.batch or BATCHES[options.what]:
            if options.what == "layers":
                rows = list(layer_times(program, batch, dtype, peaks, device, options.kernels))
                total, share = sum(row["seconds"] for row in rows), [row["fraction"] for row in rows]
                shown = f"{rows[0]['layout']}: {len(rows)} convolutions, {1e6 * total:.0f} us, "
                lines = [f"{shown}median share of the floor {statistics.median(share):.2f}"]
            else:
                rows = list(block_times(program, batch, dtype, peaks, device))
                lines = [block_line(row) for row in rows]
            for line in lines:
                print(f"{name}, batch {batch}, {line}", flush=True)
            found += rows
            plain = {"environment": describe_environment(), options.what: found}
            write_text(options.out, json.dumps(plain, indent=1) + "\n")


def block_line(row: Row) -> str:
    """A row of ``block_times`` as text; microseconds."""
    times = {name: f"{1e6 * row[name]:.1f}" for name in ("seconds", "predicted", "per_conv", "floor")}
    return (
        f"{row['block']}, {row['what']}{', chosen' * row['chosen']}: {times['seconds']} us (predicted "
        f"{times['predicted']}), per convolution {times['per_conv']}, floor {times['floor']}, share of the "
        f"floor {row['fraction']:.2f}"
    )


if __name__ == "__main__":
    main()
