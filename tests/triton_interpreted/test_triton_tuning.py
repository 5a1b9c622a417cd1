"""Tile sizes: the rule that chooses them, tuning, and its file."""

import json
import runpy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from cases import UNEQUAL, WIDE, Case, reference

pytest.importorskip("triton")

from dsp_kernels.run.gpu.triton.tune import ConfigCache, cache_file, kept_config, signature, tune

from dsp_kernels import GroupStructure
from dsp_kernels.errors import DSPBackendError
from dsp_kernels.run.gpu.layout import GpuLayout
from dsp_kernels.run.gpu.triton.config import TritonConfig, candidates, choose, choose_packing
from dsp_kernels.run.gpu.triton.conv import TritonConv

TABLE = Path(__file__).resolve().parents[2] / "scripts" / "triton_table.py"

CHWN, NHWC = GpuLayout.CHWN, GpuLayout.NHWC
CASE = Case("", UNEQUAL, batch=8, hw=(3, 4), residual=True)
CONFIG = TritonConfig(True, 64, 8, 16, 32, 4, 3, ".ca")


def prepared() -> tuple[TritonConv, torch.Tensor, torch.Tensor, torch.Tensor]:
    a = CASE.tensors()
    assert a.residual is not None
    conv = TritonConv(CASE.spec, a.weights, a.bias, CHWN)
    return conv, CHWN.from_nchw(a.x), torch.full((9, 3, 4, 8), torch.nan), CHWN.from_nchw(a.residual)


def test_tuning_measures_few_keeps_the_fastest_and_does_not_write_out(tmp_path: Path) -> None:
    conv, x, out, residual = prepared()
    cache = ConfigCache(tmp_path / "sub" / "file.json")
    times: list[float] = []

    def timer(launch: Callable[[], None]) -> float:
        launch()
        times.append(1 / (len(times) + 1))
        return times[-1]

    best = tune(conv, x, out, residual, timer=timer, cache=cache)
    tried = candidates(CASE.spec, x.dtype, CHWN, True, 8, (3, 4))
    assert len(times) == len(tried) <= 12
    assert best == tried[-1]
    assert out.isnan().all()
    again = ConfigCache(cache.file)
    assert kept_config(conv, x, out, residual, again) == best
    assert kept_config(conv, x, out, None, again) is None  # another signature
    conv(x, out, residual)  # launches the tuned configuration
    expected = reference(CASE, CASE.tensors())
    torch.testing.assert_close(CHWN.as_nchw(out).double(), expected, rtol=1e-5, atol=1e-5)


def test_tuning_needs_a_gpu_or_a_timer() -> None:
    conv, x, out, residual = prepared()
    with pytest.raises(DSPBackendError, match="on a GPU"):
        tune(conv, x, out, residual)


def test_no_tuning_without_a_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DSP_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr("dsp_kernels.run.gpu.triton.tune.tune", lambda *_, **__: pytest.fail("tuned"))
    conv, x, out, residual = prepared()
    assert kept_config(conv, x, out, residual) is None
    conv(x, out, residual)
    assert not list(tmp_path.iterdir())


def test_a_configuration_on_disk_that_is_not_a_candidate_is_ignored(tmp_path: Path) -> None:
    conv, x, out, residual = prepared()
    cache = ConfigCache(tmp_path / "file.json")
    cache.put(signature(conv, x, residual), TritonConfig(True, 1 << 20, 8, 16, 32, 4, 3))
    assert kept_config(conv, x, out, residual, cache) is None


def entry(**changes: object) -> dict[str, object]:
    return {**asdict(CONFIG), **changes}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "[" * 100000,
        '{"version": 2, "configs": {}}',
        '{"version": 1}',
        '{"version": 1, "configs": [1]}',
        *(
            json.dumps({"version": 1, "configs": {"key": bad}})
            for bad in (None, [], {}, entry(cols="64"), entry(cols=64.0), entry(chwn=1), entry(more=1))
        ),
        json.dumps({"version": 1, "configs": {"key": entry()}}) + " " * (5 << 20),
        b"\xff\xfe\x00",
    ],
    ids=lambda text: str(text[:40]),
)
def test_damaged_files_count_as_empty(text: str | bytes, tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert ConfigCache(file).get("key") is None
    cache = ConfigCache(file)
    cache.put("key", CONFIG)
    assert ConfigCache(file).get("key") == CONFIG
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


def test_concurrent_writers_keep_both_entries(tmp_path: Path) -> None:
    first, second = (ConfigCache(tmp_path / "file.json") for _ in range(2))
    assert first.get("a") is second.get("b") is None
    first.put("a", CONFIG)
    second.put("b", CONFIG)
    assert ConfigCache(tmp_path / "file.json").get("a") == CONFIG


def test_a_folder_that_cannot_be_written_is_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = ConfigCache(tmp_path / "file" / "inside.json")
    cache.put("key", CONFIG)
    assert cache.get("key") == CONFIG


def test_the_name_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSP_KERNELS_CACHE", "/somewhere")
    assert cache_file("NVIDIA H200/../x", "3.9.0") == Path("/somewhere/triton-3.9.0-NVIDIA-H200-..-x.json")
    monkeypatch.delenv("DSP_KERNELS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert cache_file("a", "1").parent == Path("/cache/dsp-kernels")


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
        for _, config, kind, _ in runpy.run_path(str(TABLE))["shipped"]()
    }
    for kernel in (1, 3):
        spec = Case("", structure, kernel=kernel).spec
        for layout, wide in ((CHWN, True), (NHWC, True), (NHWC, False)):
            packing = choose_packing(spec, dtype, wide)
            for batch in (8, 256):
                c = choose(spec, dtype, layout, wide, packing, batch, (28, 28))
                assert (c.chwn, dtype, c.cols, c.filters, c.bk, c.warps, c.stages) in checked
                assert batch % c.images == 0
                assert (c.filters, c.bk) == packing
                allowed = candidates(spec, dtype, layout, wide, batch, (28, 28))
                assert allowed[0] == c
                assert len(allowed) <= 12


def test_wide_groups_get_wide_tiles() -> None:
    def filters(o: int) -> int:
        spec = Case("", GroupStructure.build(64, 256, [(range(40), range(o))])).spec
        return choose_packing(spec, torch.float16, True)[0]

    assert [filters(o) for o in (5, 256)] == [16, 128]
