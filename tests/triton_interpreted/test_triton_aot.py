"""The Triton kernel compiled for real GPUs, without one.

``make test-triton``: every configuration that the rule can choose; prints their registers and shared memory.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from resources import find_cuobjdump, read_kernels
from triton_ptx import compiled, shipped

from dsp_kernels.run.gpu.triton.config import TritonConfig

ALL = os.environ.get("DSP_TEST_ALL_TRITON")
HALF = torch.float16
GOOD = TritonConfig(True, 128, 32, 16, 32, 4, 3, ".ca")
_ASYNC_16_BYTES = r"cp\.async\.c[ga]\.shared\.global \[[^\]]*\], \[[^\]]*\], (?:0x10|16)\b"


@dataclass(frozen=True)
class Chip:
    """A multiprocessor: bytes of shared memory, warps; its tensor cores' instruction in PTX and in SASS."""

    shared: int
    warps: int
    ptx: str
    sass: str


# By compute capability: A100, H100, B200, RTX 50.
CHIPS = {
    80: Chip(164 << 10, 64, "mma.sync", "HMMA"),
    90: Chip(228 << 10, 64, "wgmma.mma_async", "HGMMA"),
    100: Chip(228 << 10, 64, "tcgen05.mma", "UTCHMMA"),
    120: Chip(100 << 10, 48, "mma.sync", "HMMA"),
}


@dataclass(frozen=True)
class Compiled:
    """Registers per thread, shared memory and spilled (local) memory in bytes, and the code."""

    registers: int
    shared: int
    spill: int
    ptx: str
    sass: str

    def count(self, pattern: str) -> int:
        """Occurrences of a regular expression in the PTX."""
        return len(re.findall(pattern, self.ptx))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def compile_config(
    folder: Path, config: TritonConfig, dtype: torch.dtype, capability: int, **flags: object
) -> Compiled:
    """flags: constexpr arguments that the configuration lacks."""
    constants = dict.fromkeys(("POINTWISE", "WIDE_IN", "WIDE_OUT", "BIG", "EXACT"), False)
    constants |= {"HAS_RESIDUAL": True, "ACTIVATION": 1, "PRECISION": "ieee", **config.constants(), **flags}
    binary = compiled(dtype, constants, capability, config.options())
    (folder / "kernel.cubin").write_bytes(binary.asm["cubin"])
    (kernel,) = read_kernels(folder / "kernel.cubin", find_cuobjdump() or "")
    return Compiled(kernel.registers, binary.metadata.shared, kernel.stack, binary.asm["ptx"], kernel.sass)


def resident_warps(made: Compiled, config: TritonConfig, capability: int) -> int:
    """Warps of such programs that fit one multiprocessor. Registers are allocated in multiples of 8."""
    chip = CHIPS[capability]
    by_registers = (1 << 16) // (config.warps * 32 * -(-made.registers // 8) * 8)
    by_shared = chip.shared // (made.shared + 1024)  # reserved for each program
    return config.warps * min(by_registers, by_shared, chip.warps // config.warps)


def faults(made: Compiled, config: TritonConfig, dtype: torch.dtype, capability: int) -> list[str]:
    """What is wrong with a compiled configuration.

    A multiprocessor should hold three warps for each of its four schedulers, so that two can wait for memory
    or a barrier while one issues; two where the sums of a tile take 64 registers of every thread.
    """
    chip, warps = CHIPS[capability], resident_warps(made, config, capability)
    wanted = 8 if config.cols * config.filters >= 64 * 128 else 12
    stores, wide = made.count(r"st\.global"), made.count(r"st\.global[.\w]*\.v4\.b32")
    is_half = dtype != torch.float32
    found = {
        f"{made.spill} bytes of registers are spilled": made.spill,
        f"{made.registers} registers and {made.shared} bytes leave {warps} of {wanted} warps": warps < wanted,
        f"no {chip.ptx} instructions": is_half and (chip.ptx not in made.ptx or chip.sass not in made.sass),
        "no asynchronous 16-byte reads": is_half and config.chwn and not made.count(_ASYNC_16_BYTES),
        "activations are read 2 bytes at a time": is_half and config.chwn and "LDG.E.U16" in made.sass,
        f"only {wide} of {stores} stores are of 16 bytes": config.chwn and stores != wide,
    }
    return [text for text, is_wrong in found.items() if is_wrong]


@pytest.mark.parametrize("capability", CHIPS)
@pytest.mark.parametrize("dtype", [HALF, torch.bfloat16], ids=str)
def test_chwn_has_wide_accesses_and_tensor_cores(dtype: torch.dtype, capability: int, folder: Path) -> None:
    made = compile_config(folder, GOOD, dtype, capability)
    assert faults(made, GOOD, dtype, capability) == []
    assert made.registers <= 80


def test_nhwc_with_runs_of_8_channels_has_them_too(folder: Path) -> None:
    config = TritonConfig(False, 64, 1, 16, 32, 4, 3)
    made = compile_config(folder, config, HALF, 90, WIDE_IN=True, WIDE_OUT=True)
    assert faults(made, config, HALF, 90) == []
    assert made.count(r"st\.global[.\w]*\.v4\.b32") == made.count(r"st\.global")
    narrow = compile_config(folder, config, HALF, 90)
    assert narrow.count(r"st\.global[.\w]*\.v4\.b32") == 0


def test_float32_uses_tf32_only_on_request(folder: Path) -> None:
    config = TritonConfig(True, 64, 32, 16, 16, 4, 3)
    made = compile_config(folder, config, torch.float32, 90)
    assert faults(made, config, torch.float32, 90) == []
    assert "FFMA" in made.sass
    assert not made.count("tf32")
    assert compile_config(folder, config, torch.float32, 80, PRECISION="tf32").count("tf32")


def test_64_bit_offsets_compile(folder: Path) -> None:
    assert faults(compile_config(folder, GOOD, HALF, 80, BIG=True), GOOD, HALF, 80) == []


def test_faults_are_found() -> None:
    bad = Compiled(255, 1 << 20, 8, "st.global.b16 [%rd1], %rs1;", "LDG.E.U16")
    words = " ".join(faults(bad, GOOD, HALF, 90))
    found = ("spilled", "255 registers", "0 of 12 warps", "wgmma", "asynchronous", "2 bytes", "0 of 1 stores")
    assert all(word in words for word in found)


def every() -> Iterator[object]:
    for (name, config, dtype, flags), capability in product(shipped(), CHIPS):
        tile = f"{config.cols}x{config.filters}x{config.bk}"
        yield pytest.param(config, dtype, flags, capability, id=f"{name}-{dtype}-{tile}-sm_{capability}")


@pytest.mark.skipif(not ALL, reason="make test-triton compiles every configuration")
@pytest.mark.parametrize(("config", "dtype", "flags", "capability"), list(every()) if ALL else [])
def test_every_configuration(
    config: TritonConfig, dtype: torch.dtype, flags: dict[str, bool], capability: int, folder: Path
) -> None:
    made = compile_config(folder, config, dtype, capability, **flags)
    held = resident_warps(made, config, capability)
    print(f"{made.registers} registers, {made.shared} bytes shared, {held} warps held")
    assert faults(made, config, dtype, capability) == []
