"""The Triton kernel in Triton's interpreter against the reference in float64; outputs start as NaN."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from cases import CASES, ONE_TO_ONE, UNEQUAL, WIDE, Arguments, Case, reference
from gpu_checks import check_conv, launched, layer_of
from torch import Tensor

pytest.importorskip("triton")

from dsp_kernels import GroupStructure
from dsp_kernels.errors import DSPShapeError
from dsp_kernels.op.activations import ACTIVATIONS
from dsp_kernels.run.convs import BACKENDS
from dsp_kernels.run.gpu.conv import GPU_KERNELS
from dsp_kernels.run.gpu.layout import GpuLayout, uses_tf32
from dsp_kernels.run.gpu.triton.config import TritonConfig
from dsp_kernels.run.gpu.triton.conv import TritonConv
from dsp_kernels.run.gpu.triton.tables import reads_runs, writes_runs

CHWN, NHWC = GpuLayout.CHWN, GpuLayout.NHWC
HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
LAYOUTS = pytest.mark.parametrize("layout", [CHWN, NHWC], ids=lambda layout: layout.name)

# Channels in aligned runs of 8, so that NHWC reads and writes 16 bytes at once.
RUNS = GroupStructure.build(32, 24, [([*range(8, 16), *range(24, 32)], range(16, 24)), (range(8), range(8))])
EXTRA = (
    Case("runs of 8 channels", RUNS, hw=(5, 4), residual=True),
    Case("runs of 8 channels, 1x1", RUNS, kernel=1, padding=0, hw=(3, 4)),
    Case("more channels than a block", GroupStructure.dense(72, 8), hw=(3, 3)),
    Case("more filters than a tile", GroupStructure.build(3, 40, [([2, 0], range(1, 40))]), hw=(3, 2)),
    Case("padding 2", UNEQUAL, padding=2, hw=(3, 4)),
    Case(
        "dilation and stride", WIDE, dilation=(1, 3), stride=2, padding=(0, 3), hw=(5, 6), activation="relu"
    ),
)
TABLE = [case for case in (*CASES, *EXTRA) if case.batch]
# Of 16 bits a part of the table: they differ in how numbers are read, multiplied and rounded, not in which.
SOME = [
    case
    for case in TABLE
    if case in EXTRA or case.structure in (ONE_TO_ONE, WIDE) or "residual" in case.name or "no " in case.name
]


def check(
    case: Case,
    layout: GpuLayout,
    dtype: torch.dtype = SINGLE,
    in_place: bool = False,
    config: TritonConfig | None = None,
) -> None:
    if layout is CHWN and case.batch % 8:
        case = replace(case, batch=8)
    conv = TritonConv(layer_of(case, layout, dtype), config)
    check_conv(conv, case, dtype, layout, in_place=in_place)


def run(case: Case, a: Arguments, layout: GpuLayout) -> Tensor:
    shape = (case.batch, case.structure.out_channels, *case.spec.output_hw(case.hw))
    return launched(TritonConv(layer_of(case, layout, SINGLE)), a.x, None, shape, layout, False)


@LAYOUTS
@pytest.mark.parametrize(
    ("dtype", "case"),
    [*((SINGLE, case) for case in TABLE), *product((HALF, BRAIN), SOME)],
    ids=lambda value: value.name if isinstance(value, Case) else str(value),
)
def test_convolution(case: Case, dtype: torch.dtype, layout: GpuLayout) -> None:
    check(case, layout, dtype)


RESIDUAL = Case("residual in place", UNEQUAL, residual=True, activation="relu", hw=(5, 4))


@pytest.mark.parametrize("dtype", [SINGLE, HALF], ids=str)
@LAYOUTS
def test_out_is_the_residual(layout: GpuLayout, dtype: torch.dtype) -> None:
    check(RESIDUAL, layout, dtype, in_place=True)


@pytest.mark.parametrize(
    ("layout", "batch"), [(CHWN, 16), (CHWN, 24), (CHWN, 40), (NHWC, 1), (NHWC, 3), (NHWC, 8)]
)
def test_batches(layout: GpuLayout, batch: int) -> None:
    check(replace(RESIDUAL, batch=batch), layout, HALF)


@pytest.mark.parametrize("cols", [64, 128])
@pytest.mark.parametrize("images", [8, 16, 32])
def test_tiles_of_pixels_and_images(images: int, cols: int) -> None:
    config = TritonConfig(True, cols, images, 16, 16, 4, 3)
    check(replace(RESIDUAL, batch=32), CHWN, config=config)


@pytest.mark.parametrize(("filters", "bk"), [(16, 32), (32, 16), (64, 64)])
def test_tiles_of_filters_and_depth(filters: int, bk: int) -> None:
    case = Case("", WIDE, hw=(3, 4))
    check(case, CHWN, config=TritonConfig(True, 64, 8, filters, bk, 4, 3))
    check(case, NHWC, config=TritonConfig(False, 64, 1, filters, bk, 4, 3))


@LAYOUTS
def test_64_bit_offsets(layout: GpuLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsp_kernels.run.gpu.triton.conv._INT32", 1)
    check(RESIDUAL, layout)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_inputs_larger_than_l2(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns are processed in blocks; the last block is smaller."""
    monkeypatch.setattr("dsp_kernels.run.gpu.triton.conv.columns_in_l2", lambda *_: block)
    case = Case(
        "", GroupStructure.build(4, 40, [([1, 3], range(20)), ([0], range(20, 40))]), hw=(7, 5), kernel=1
    )
    check(case, CHWN)


@LAYOUTS
def test_nan_in_channels_that_no_group_reads(layout: GpuLayout) -> None:
    case = Case("", GroupStructure.build(5, 3, [([3, 1], [2, 0])]), batch=8, hw=(4, 4))
    a = case.tensors()
    expected = reference(case, a)
    a.x[:, [0, 2, 4]] = torch.nan
    torch.testing.assert_close(run(case, a, layout).double(), expected, rtol=1e-5, atol=1e-5)


def test_every_activation_keeps_nan() -> None:
    for activation in ACTIVATIONS:
        case = Case("", ONE_TO_ONE, kernel=1, padding=0, hw=(2, 2), activation=activation)
        a = case.tensors()
        a.x[0, 0, 1, 0] = torch.nan
        assert torch.equal(run(case, a, NHWC).isnan(), a.x.isnan())


def test_tf32_only_where_the_convolutions_of_torch_use_it() -> None:
    before = torch.backends.cudnn.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            assert [uses_tf32(dtype) for dtype in (SINGLE, HALF, BRAIN)] == [allowed, False, False]
    finally:
        torch.backends.cudnn.allow_tf32 = before


def test_tensors_that_do_not_fit_are_refused() -> None:
    case = Case("", UNEQUAL, batch=8, hw=(4, 4))
    a = case.tensors()
    conv = TritonConv(layer_of(case, CHWN, SINGLE))
    x, out, memory = CHWN.from_nchw(a.x), torch.empty(9, 4, 4, 8), torch.zeros(16 * 128)
    for bad in (
        (a.x, out, None),
        (x.transpose(1, 2), out, None),
        (x, out[:8], None),
        (x, out.half(), None),
        (x.half(), out.half(), None),
        (x[..., :6].contiguous(), torch.empty(9, 4, 4, 6), None),
        (x, out, torch.empty(9, 4, 4)),
        (x, torch.empty(9 * 128 + 1)[1:].view(9, 4, 4, 8), None),
        (memory[: x.numel()].view(x.shape), memory[: out.numel()].view(out.shape), None),  # out is x
    ):
        with pytest.raises(DSPShapeError):
            conv(*bad)
    conv(x[..., :0].contiguous(), out[..., :0].contiguous())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [2, 8])
def test_backend_keeps_the_memory_format(batch: int, channels_last: bool) -> None:
    case = Case("", UNEQUAL, batch=batch, hw=(3, 4), residual=True, channels_last=channels_last)
    a = case.tensors()
    backend = BACKENDS.choose("triton", case.spec, SINGLE, a.x.device, torch.contiguous_format)
    y = backend.prepare(case.spec, a.weights, a.bias)(a.x, a.residual)
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    torch.testing.assert_close(y.double(), reference(case, a), rtol=1e-5, atol=1e-5)


def test_auto_never_chooses_the_interpreter() -> None:
    spec, device = RESIDUAL.spec, torch.device("cpu")
    assert (
        BACKENDS.choose("auto", spec, SINGLE, device, torch.contiguous_format).name not in GPU_KERNELS.names()
    )
    assert GPU_KERNELS.choose("triton", spec, SINGLE, device).name == "triton"


def test_reasons_why_it_cannot_run() -> None:
    triton = GPU_KERNELS.choose("triton", RESIDUAL.spec, SINGLE, torch.device("cpu"))
    for spec, dtype, device, word in (
        (RESIDUAL.spec, torch.float64, "cpu", "float64"),
        (RESIDUAL.spec, SINGLE, "meta", "meta"),
        (replace(RESIDUAL, dilation=200).spec, SINGLE, "cpu", "400"),
        (Case("", GroupStructure.dense(70000, 1)).spec, SINGLE, "cpu", "70000"),
    ):
        able, reason = triton.can_run(spec, dtype, torch.device(device))
        assert not able
        assert word in reason


def test_runs_of_8_channels() -> None:
    assert reads_runs(Case("", RUNS).spec)
    assert writes_runs(Case("", RUNS).spec)  # so are the absent channels 8 to 15
    for channels in (range(4, 12), [*range(7), 8], range(12), [1, 0, *range(2, 8)]):
        structure = GroupStructure.build(32, 32, [(channels, channels)])
        assert not reads_runs(Case("", structure).spec)
        assert not writes_runs(Case("", structure).spec)
    assert not reads_runs(Case("", GroupStructure.build(12, 8, [(range(8), range(8))])).spec)
