"""Tile sizes: the rule that chooses them, and what tuning may measure."""

import pytest
import torch
from cases import UNEQUAL, WIDE, Case, reference
from gpu_checks import layer_of

pytest.importorskip("triton")

from triton_ptx import shipped

from dsp_kernels import GroupStructure
from dsp_kernels.run.gpu.layout import GpuLayout
from dsp_kernels.run.gpu.triton.config import TileRule
from dsp_kernels.run.gpu.triton.conv import TritonKernels

CHWN, NHWC = GpuLayout.CHWN, GpuLayout.NHWC
CASE = Case("", UNEQUAL, batch=8, hw=(3, 4), residual=True)


@pytest.mark.parametrize("wanted", ["1", "all"])
def test_every_option_that_is_measured_gives_the_right_answer(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DSP_KERNELS_TUNE", wanted)
    a = CASE.tensors()
    assert a.residual is not None
    x, residual = CHWN.from_nchw(a.x), CHWN.from_nchw(a.residual)
    options = TritonKernels().options(layer_of(CASE, CHWN, x.dtype), a.x.shape)
    configs = TileRule(CASE.spec, x.dtype, CHWN, True).candidates(8, (3, 4))
    assert len(options) == (len(configs) if wanted == "all" else 1) <= 12
    for make in options.values():
        out = torch.full((9, 3, 4, 8), torch.nan)
        make()(x, out, residual)
        torch.testing.assert_close(CHWN.as_nchw(out).double(), reference(CASE, a), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "structure",
    [UNEQUAL, WIDE, GroupStructure.dense(64, 64), GroupStructure.dense(256, 512), GroupStructure(4, 5)],
    ids=str,
)
def test_the_rule_chooses_only_configurations_that_make_test_triton_compiles(
    structure: GroupStructure, dtype: torch.dtype
) -> None:
    checked = {
        (config.chwn, kind, config.cols, config.filters, config.bk, config.warps, config.stages)
        for _, config, kind, _ in shipped()
    }
    for kernel in (1, 3):
        spec = Case("", structure, kernel=kernel).spec
        for layout, wide in ((CHWN, True), (NHWC, True), (NHWC, False)):
            rule = TileRule(spec, dtype, layout, wide)
            for batch in (8, 256):
                c = rule.choose(batch, (28, 28))
                assert (c.chwn, dtype, c.cols, c.filters, c.bk, c.warps, c.stages) in checked
                assert batch % c.images == 0
                assert (c.filters, c.bk) == rule.packing
                allowed = rule.candidates(batch, (28, 28))
                assert allowed[0] == c
                assert len(allowed) <= 12


def test_wide_groups_get_wide_tiles() -> None:
    def filters(o: int) -> int:
        spec = Case("", GroupStructure.build(64, 256, [(range(40), range(o))])).spec
        return TileRule(spec, torch.float16, CHWN, True).packing[0]

    assert [filters(o) for o in (5, 256)] == [16, 128]
