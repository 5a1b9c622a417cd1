"""Prepared GPU convolutions and blocks against the definition, whatever runs them."""

from collections.abc import Sequence
from functools import lru_cache

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
    x, bias = a.x.to(device), None if a.bias is None else a.bias.to(device)
    return GpuLayer(case.spec, [weight.to(device) for weight in a.weights], bias, layout, dtype, x.device)


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


Solved = tuple[Tensor, Tensor | None, Tensor]  # x, residual, the expected output


@lru_cache(maxsize=8)  # one case runs in several layouts, kernels and orders
def solved(case: Case, dtype: torch.dtype) -> Solved:
    """Channels that no group reads hold NaN."""
    arguments = case.tensors(dtype)
    read = set(case.structure.read)
    arguments.x[:, [channel for channel in range(case.structure.in_channels) if channel not in read]] = (
        torch.nan
    )
    return arguments.x, arguments.residual, cases.reference(case, arguments)


def check_conv(
    conv: GpuConv,
    case: Case,
    dtype: torch.dtype,
    layout: GpuLayout,
    device: torch.device = CPU,
    in_place: bool = False,
) -> None:
    """conv: made from ``layer_of`` the same case."""
    x, residual, expected = solved(case, dtype)
    added = None if residual is None else residual.to(device)
    y = launched(conv, x.to(device), added, expected.shape, layout, in_place)
    assert_close(y, expected, op_tolerance(dtype, case.reduction))


@lru_cache(maxsize=8)
def solved_block(case: BlockCase, dtype: torch.dtype) -> Solved:
    step, x, residual = case.step(dtype), case.input(dtype), None
    if case.shortcut == "tensor":
        generator = torch.Generator().manual_seed(3)
        residual = torch.randn(step.output_shape(x.shape), generator=generator).to(dtype)
    return x, residual, block_cases.reference(step, x, residual)


def check_block(
    block: CudaBlock,
    case: BlockCase,
    dtype: torch.dtype,
    device: torch.device = CPU,
    in_place: bool = False,
) -> None:
    """block: made from ``case.step(dtype)``."""
    x, residual, expected = solved_block(case, dtype)
    added = None if residual is None else residual.to(device)
    y = launched(block, x.to(device), added, expected.shape, GpuLayout.CHWN, in_place)
    assert_close(y, expected, network_tolerance(dtype, case.reduction, len(block.step.members)))
