"""Prepared GPU convolutions and blocks against the definition, whatever runs them."""

from collections.abc import Callable, Sequence

import block_cases
import cases
import torch
from block_cases import BlockCase
from cases import Case
from torch import Tensor

from dsp_kernels.run.gpu.cuda.blocks.conv import CudaBlock
from dsp_kernels.run.gpu.layout import GpuConv, GpuLayer, GpuLayout
from dsp_kernels.tolerances import network_tolerance, op_tolerance

CPU = torch.device("cpu")


def layer_of(case: Case, layout: GpuLayout, dtype: torch.dtype, device: torch.device = CPU) -> GpuLayer:
    """The case's convolution with its weights and bias."""
    a = case.tensors(dtype)
    bias = None if a.bias is None else a.bias.to(device)
    return GpuLayer(case.spec, [weight.to(device) for weight in a.weights], bias, layout, dtype, device)


def guarded(values: Tensor) -> tuple[Tensor, Tensor]:
    """(a copy of the values, the NaN before and after it in memory)."""
    memory = values.new_full((values.numel() + 128,), torch.nan)
    inside = memory[64:-64].view(values.shape)
    inside.copy_(values)
    return inside, torch.stack([memory[:64], memory[-64:]])


def launched(
    conv: GpuConv, x: Tensor, residual: Tensor | None, shape: Sequence[int], layout: GpuLayout, in_place: bool
) -> Tensor:
    """The output as (batch, channels, height, width) on the CPU, from guarded memory that held NaN.

    x, residual: (batch, channels, height, width) on the device. in_place: out is the residual.
    """
    inside, _ = guarded(layout.from_nchw(x))
    out, around = guarded(x.new_full(layout.shape(shape), torch.nan))
    added = None if residual is None else layout.from_nchw(residual)
    conv(inside, out, out.copy_(added) if in_place and added is not None else added)
    assert around.isnan().all(), "out of bounds write"
    return layout.as_nchw(out).cpu().double()


def assert_close(y: Tensor, expected: Tensor, tolerance: float) -> None:
    assert y.shape == expected.shape
    assert y.isfinite().all(), "an output was not written, or memory was read before it was written"
    if y.numel():
        error = (y - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
        assert error <= tolerance, f"relative error {error:.2e}"


def check_conv(
    prepare: Callable[[GpuLayer], GpuConv],
    case: Case,
    dtype: torch.dtype,
    layout: GpuLayout,
    device: torch.device = CPU,
    in_place: bool = False,
) -> None:
    """prepare: makes the convolution to test. Channels that no group reads hold NaN."""
    arguments = case.tensors(dtype)
    read = set(case.structure.read)
    arguments.x[:, [channel for channel in range(case.structure.in_channels) if channel not in read]] = (
        torch.nan
    )
    residual = None if arguments.residual is None else arguments.residual.to(device)
    conv = prepare(layer_of(case, layout, dtype, device))
    expected = cases.reference(case, arguments)
    y = launched(conv, arguments.x.to(device), residual, expected.shape, layout, in_place)
    assert_close(y, expected, op_tolerance(dtype, case.reduction))


def check_block(
    block: CudaBlock,
    case: BlockCase,
    dtype: torch.dtype,
    device: torch.device = CPU,
    in_place: bool = False,
) -> None:
    """block: made from ``case.step(dtype)``."""
    x = case.input(dtype)
    shape = block.step.output_shape(x.shape)
    residual = None
    if case.shortcut == "tensor":
        residual = torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    expected = block_cases.reference(case.step(dtype), x, residual)
    added = None if residual is None else residual.to(device)
    y = launched(block, x.to(device), added, shape, GpuLayout.CHWN, in_place)
    assert_close(y, expected, network_tolerance(dtype, case.reduction, len(block.step.members)))
