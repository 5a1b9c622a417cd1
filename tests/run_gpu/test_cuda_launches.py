"""What Python tells the CUDA kernels, and the tensors that it refuses; tests/cuda_ptx runs the kernels."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from block_cases import BACK, NARROW, BlockCase
from cases import UNEQUAL, Case
from gpu_checks import layer_of
from ptx_checks import layout_of, prepared_block
from torch import Tensor

from dsp_kernels import GroupStructure
from dsp_kernels.errors import DSPBackendError, DSPShapeError
from dsp_kernels.run.gpu.cuda.blocks.geometry import BlockGeometry
from dsp_kernels.run.gpu.cuda.blocks.tables import block_tables
from dsp_kernels.run.gpu.cuda.conv import CudaConv, CudaKernels
from dsp_kernels.run.gpu.cuda.kernels import kernels_for
from dsp_kernels.run.gpu.cuda.launch import KERNEL_CODES, BlockConv, BlockRegion, BlockSizes, ConvSizes
from dsp_kernels.run.gpu.cuda.library import why_no_cuda
from dsp_kernels.run.gpu.layout import ACTIVATION_CODES, GpuLayout

CHWN, NHWC = GpuLayout.CHWN, GpuLayout.NHWC
CPU = torch.device("cpu")
BLOCK = BlockCase("block", ((NARROW, 3, 1), (BACK, 3, 1)))


@pytest.mark.parametrize(
    ("layout", "change", "text"),
    [
        (NHWC, lambda x, out: (x[..., :6].contiguous(), out), "x has shape"),
        (NHWC, lambda x, out: (x, out[:, :, :, :-1]), "out has shape"),
        (NHWC, lambda x, out: (x.half(), out), "x is torch.float16"),
        (NHWC, lambda x, out: (x.transpose(1, 2), out), "not contiguous"),
        (NHWC, lambda x, out: (x[0], out), "4 dimensions"),
        (CHWN, lambda x, out: (x, out), "multiple of 8"),
    ],
)
def test_tensors_that_do_not_fit(
    layout: GpuLayout, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], text: str
) -> None:
    case = Case("bad", UNEQUAL, batch=4, hw=(6, 6))
    arguments = case.tensors()
    layer = layer_of(case, layout, torch.float32)
    conv = CudaConv(layer)
    for kind in ({"dtype": torch.float16}, {"device": torch.device("meta")}):
        with pytest.raises(DSPShapeError, match=r"weights are .* on cpu; this is for"):
            replace(layer, **kind)
    x, out = change(layout.from_nchw(arguments.x), torch.empty(layout.shape((4, 9, 6, 6))))
    with pytest.raises(DSPShapeError, match=text):
        conv(x, out)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda x, out: (x[..., :4].contiguous(), out[..., :4].contiguous(), None), "multiple of 8"),
        (lambda x, out: (x[:, 1:].contiguous(), out, None), "x has shape"),
        (lambda x, out: (x, out[:, :, 1:].contiguous(), None), "out has shape"),
        (lambda x, out: (x.bfloat16(), out, None), "bfloat16"),
        (lambda x, out: (x.transpose(1, 2).contiguous().transpose(1, 2), out, None), "not contiguous"),
        (lambda x, out: (x, out, out), "takes no residual"),
    ],
)
def test_tensors_that_do_not_fit_a_block(
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]], text: str
) -> None:
    block = prepared_block(BLOCK, torch.float16)
    x = CHWN.from_nchw(BLOCK.input(torch.float16))
    with pytest.raises(DSPShapeError, match=text):
        block(*change(x, torch.empty_like(x)))


def test_a_shortcut_that_reads_outside_the_tile_has_no_geometry() -> None:
    wide = BlockCase("far", BLOCK.convs, (GroupStructure.dense(7, 7), 7, 1))
    tables = block_tables(wide.step(torch.float16), torch.float16, CPU)
    assert BlockGeometry.of(tables.step, tables.slots, (8, 8), (4, 4), 1) is None


DENSE, FOUR = GroupStructure.dense(64, 64), GroupStructure.uniform(64, 64, 4)


@pytest.mark.parametrize(
    ("structure", "kernel", "batch", "hw", "expected"),
    [
        (DENSE, 3, 256, (56, 56), "halo"),
        (DENSE, 3, 8, (7, 7), "chwn"),  # too few blocks for the halo kernel
        (FOUR, 1, 256, (28, 28), "chwn"),
        (FOUR, 3, 256, (28, 28), "halo"),
        (DENSE, 3, 3, (56, 56), "nhwc"),
        (DENSE, 3, 1, (7, 7), "nhwc_sliced"),
    ],
)
def test_which_kernel_is_launched_where_nothing_is_measured(
    structure: GroupStructure, kernel: int, batch: int, hw: tuple[int, int], expected: str
) -> None:
    case = Case("rule", structure, kernel=kernel, padding=kernel // 2)
    layer, shape = layer_of(case, layout_of(expected), torch.float16), (batch, structure.in_channels, *hw)
    assert CudaConv(layer).describe(shape).startswith(f"kernel={expected} ")
    options = CudaKernels().options(layer, shape)
    assert next(iter(options)) == f"cuda {expected}"
    assert len(options) == len(kernels_for(layer, wgmma=False))


def test_a_launch_is_described_field_by_field() -> None:
    case = Case("strided", UNEQUAL, stride=2, activation="relu")
    conv = CudaConv(layer_of(case, NHWC, torch.float32))
    shape = (3, UNEQUAL.in_channels, 9, 7)
    fields = dict(field.split("=") for field in conv.describe(shape).split())
    assert list(fields) == list(ConvSizes._fields)
    assert (fields["kernel"], fields["activation"]) == ("fp32_nhwc", "relu")
    assert (fields["batch"], fields["height"], fields["stride_x"]) == ("3", "9", "2")
    head, *parts = prepared_block(BLOCK, torch.float16).describe((16, 7, 5, 6)).splitlines()
    assert "batch=16" in head
    assert "residual_kind=input" in head
    assert [part.split(":")[0].strip() for part in parts] == [f"regions[{i}]" for i in range(3)] + [
        f"convs[{i}]" for i in range(2)
    ]


def test_an_op_that_refuses_names_the_launch() -> None:
    if reason := why_no_cuda():
        pytest.skip(reason)
    case = Case("refused", UNEQUAL, batch=2)
    arguments = case.tensors()
    conv = CudaConv(layer_of(case, NHWC, torch.float32))
    x = NHWC.from_nchw(arguments.x)
    with pytest.raises(DSPBackendError, match=r"(?s)cuda_conv: .* launched with kernel=fp32_nhwc filters=32"):
        conv(x, torch.empty(NHWC.shape(case.spec.output_shape(arguments.x.shape))))


def test_the_names_are_those_of_csrc() -> None:
    """Without the library, which checks them itself."""
    text = (Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "params.h").read_text()
    lists = {
        match[1]: re.findall(r"\bF\((\w+)\)", match[2])
        for match in re.finditer(r"#define DSP_(\w+)\(F\)((?:.*\\\n)*.*)", text)
    }
    assert lists["KERNELS"] == list(KERNEL_CODES)
    assert lists["ACTIVATIONS"] == list(ACTIVATION_CODES)
    assert list(ACTIVATION_CODES.values()) == list(range(len(ACTIVATION_CODES)))
    assert lists["CONV_FIELDS"] == list(ConvSizes._fields)
    assert [*lists["BLOCK_FIELDS"], "regions", "convs"] == list(BlockSizes._fields)
    assert lists["REGION_FIELDS"] == list(BlockRegion._fields)
    assert lists["BLOCK_CONV_FIELDS"] == list(BlockConv._fields)
