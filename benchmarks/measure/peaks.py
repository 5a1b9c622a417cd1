"""Measured peaks of this machine: copy bandwidth and multiply-add rate."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

# 12 independent accumulators hide the latency of the multiply-add (4 cycles, 2 per cycle on current cores)
# and leave registers for the operands, even with 16 registers.
_SOURCE = """
typedef float vec __attribute__((vector_size(__BIGGEST_ALIGNMENT__)));
double fma_flops(long turns, float *out) {
  vec s[12], a = {}, b = {};
  a += 0.999f; b += 0.001f;
  for (int i = 0; i < 12; ++i) s[i] = b + (float)i;
  for (long t = 0; t < turns; ++t)
    for (int i = 0; i < 12; ++i) s[i] = s[i] * a + b;
  for (int i = 1; i < 12; ++i) s[0] += s[i];
  for (int i = 0; i < (int)sizeof(vec) / 4; ++i) out[i] = s[0][i];
  return 12.0 * 2.0 * (sizeof(vec) / 4) * turns;
}
"""
_PROBE_SIZE = 256
_COPY_BYTES = 256 << 20  # far above any last-level cache
_KERNEL_SECONDS = 2.5e-6  # launch of one kernel inside a CUDA graph: assumed, not measured


@dataclass(frozen=True)
class Peaks:
    """flops: by dtype name, per second (a multiply-add is two). bandwidth: bytes read and written per second.

    launch: seconds that starting one kernel costs.
    """

    flops: dict[str, float]
    bandwidth: float
    launch: float = 0.0

    def knows(self, dtype: torch.dtype) -> bool:
        """Whether the peak of this dtype was measured."""
        return dtype_name(dtype) in self.flops

    def best(self, other: Peaks) -> Peaks:
        """The higher of each number of two measurements of one machine."""
        higher = {name: rate for name, rate in other.flops.items() if rate > self.flops.get(name, 0.0)}
        return replace(self, flops=self.flops | higher, bandwidth=max(self.bandwidth, other.bandwidth))


def dtype_name(dtype: torch.dtype) -> str:
    """As ``Peaks.flops`` and result files name it: "float32"."""
    return str(dtype).removeprefix("torch.")


def measure_peaks(device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Peaks:
    """Measure for about a second, with torch's number of threads on a CPU."""
    flops: dict[str, float] = {}
    for dtype in dtypes:
        known = flops.get("float32", 0.0)
        peak = _matmul_peak(dtype, device, known)
        if device == "cpu":
            # 16-bit products in software are slower than float32 ones, and no engine needs them.
            peak = max(peak, known)
            if dtype == torch.float32:
                peak = max(peak, _fma_peak(torch.get_num_threads()))
        flops[dtype_name(dtype)] = peak
    return Peaks(flops, _copy_bandwidth(device), 0.0 if device == "cpu" else _KERNEL_SECONDS)


def _best(call: Callable[[], object], device: str, times: int = 5) -> float:
    """Seconds of the fastest of a few calls: a peak is the machine's best, not its median."""
    taken = []
    for _ in range(times + 1):
        started = time.perf_counter()
        call()
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return min(taken[1:])  # the first warms up


def _copy_bandwidth(device: str) -> float:
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    return 2 * _COPY_BYTES / _best(lambda: target.copy_(source), device)


def _matmul_peak(dtype: torch.dtype, device: str, known: float) -> float:
    """The higher rate of two sizes. known: the rate of float32.

    0 if a small product on a CPU runs at less than an eighth of it: large ones could take a minute.
    """
    if known and device == "cpu" and _matmul_rate(_PROBE_SIZE, dtype, device) < known / 8:
        return 0.0
    return max(
        _matmul_rate(size, dtype, device) for size in ((1024, 2048) if device == "cpu" else (4096, 8192))
    )


def _matmul_rate(size: int, dtype: torch.dtype, device: str) -> float:
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    with torch.inference_mode():
        return 2 * size**3 / _best(partial(torch.matmul, left, right), device, times=3)


def _fma_peak(threads: int) -> float:
    """FLOP/s of a loop of vector multiply-adds; 0 without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
        source.write_text(_SOURCE, encoding="utf-8")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        built = subprocess.run([compiler, *flags, str(source), "-o", str(library)], capture_output=True)
        if built.returncode:
            return 0.0
        function = ctypes.CDLL(str(library)).fma_flops
    function.restype = ctypes.c_double
    function.argtypes = [ctypes.c_long, ctypes.c_void_p]
    outs = [(ctypes.c_float * 16)() for _ in range(threads)]
    turns = 1 << 21  # about 3 ms
    with ThreadPoolExecutor(threads) as pool:  # ctypes releases the GIL

        def run() -> list[float]:
            return list(pool.map(lambda out: function(turns, ctypes.addressof(out)), outs))

        seconds = _best(run, "cpu", 60)
        return sum(run()) / seconds
