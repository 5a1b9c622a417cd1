"""The Triton kernel compiled for real GPUs, without one (``make test-triton``: every configuration)."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from dsp_kernels.run.gpu.triton.config import TritonConfig

ROOT = Path(__file__).resolve().parents[2]
TABLE = runpy.run_path(str(ROOT / "scripts" / "triton_table.py"))
Compiled, compile_config, faults = TABLE["Compiled"], TABLE["compile_config"], TABLE["faults"]
HALF = torch.float16
GOOD = TritonConfig(True, 128, 32, 16, 32, 4, 3, ".ca")


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("capability", TABLE["CHIPS"])
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=str)
def test_chwn_has_wide_accesses_and_tensor_cores(dtype: torch.dtype, capability: int) -> None:
    made = compile_config(GOOD, dtype, capability)
    assert faults(made, GOOD, dtype, capability) == []
    assert made.registers <= 80


def test_nhwc_with_runs_of_8_channels_has_them_too() -> None:
    config = TritonConfig(False, 64, 1, 16, 32, 4, 3)
    made = compile_config(config, HALF, 90, WIDE_IN=True, WIDE_OUT=True)
    assert faults(made, config, HALF, 90) == []
    assert made.count(r"st\.global[.\w]*\.v4\.b32") == made.count(r"st\.global")
    narrow = compile_config(config, HALF, 90)
    assert narrow.count(r"st\.global[.\w]*\.v4\.b32") == 0


def test_float32_uses_tf32_only_on_request() -> None:
    config = TritonConfig(True, 64, 32, 16, 16, 4, 3)
    made = compile_config(config, torch.float32, 90)
    assert faults(made, config, torch.float32, 90) == []
    assert "FFMA" in made.sass
    assert not made.count("tf32")
    assert compile_config(config, torch.float32, 80, PRECISION="tf32").count("tf32")


def test_64_bit_offsets_compile() -> None:
    assert faults(compile_config(GOOD, HALF, 80, BIG=True), GOOD, HALF, 80) == []


def test_faults_are_found() -> None:
    bad = Compiled(255, 1 << 20, 8, "st.global.b16 [%rd1], %rs1;", "LDG.E.U16")
    words = " ".join(faults(bad, GOOD, HALF, 90))
    found = ("spilled", "255 registers", "0 warps", "wgmma", "asynchronous", "2 bytes", "0 of 1 stores")
    assert all(word in words for word in found)


def test_the_table_has_a_row_per_kernel() -> None:
    command = [sys.executable, "scripts/triton_table.py", "--only", "CHWN 1x1 torch.float16 64x16x32"]
    command += ["--capability", "80", "--processes", "1"]
    done = subprocess.run(command, check=True, timeout=300, cwd=ROOT, capture_output=True, text=True)
    assert "| CHWN 1x1 | float16 | 64 x 16 x 32 | 4 / 3 | sm_80 |" in done.stdout
