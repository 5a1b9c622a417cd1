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
#if defined(__AVX512F__)
#define BYTES 64
#elif defined(__AVX__)
#define BYTES 32
#else
#define BYTES 16
#endif
typedef float vec __attribute__((vector_size(BYTES)));
#define ALL(M) M(0) M(1) M(2) M(3) M(4) M(5) M(6) M(7) M(8) M(9) M(10) M(11)
double fma_flops(long turns, float *out) {
  vec a = {}, b = {};
  a += 0.999f; b += 0.001f;
#define START(i) vec s##i = b + (float)i;
  ALL(START)
  for (long t = 0; t < turns; ++t) {
#define STEP(i) s##i = s##i * a + b; __asm__ volatile("" : KEEP(s##i));
#define KEEP(x) "+x"(x)
#if BYTES == 64
#undef KEEP
#define KEEP(x) "+v"(x)
#endif
#if !defined(__x86_64__)
#undef STEP
#define STEP(i) s##i = s##i * a + b;
#endif
    ALL(STEP)
  }
  vec s = b;
#define SUM(i) s += s##i;
  ALL(SUM)
  for (int i = 0; i < BYTES / 4; ++i) out[i] = s[i];
  return 12.0 * 2.0 * (BYTES / 4) * turns;
}
"""
_PROBE_SIZE = 256
_COPY_BYTES = 256 << 20  # far above any last-level cache
_KERNEL_SECONDS = 2.5e-6  # launch of one kernel inside a CUDA graph: assumed, not measured


@dataclass(frozen=True)
class Peaks:
    """flops: by dtype name, per second (a multiply-add is two). bandwidth: bytes read and written per second.

    launch: seconds that starting one kernel costs. how: where each number comes from.
    """

    flops: dict[str, float]
    bandwidth: float
    launch: float
    threads: int
    how: dict[str, str]

    def knows(self, dtype: torch.dtype) -> bool:
        """Whether the peak of this dtype was measured."""
        return dtype_name(dtype) in self.flops

    def best(self, other: Peaks) -> Peaks:
        """The higher of each number of two measurements of one machine."""
        higher = {name: rate for name, rate in other.flops.items() if rate > self.flops.get(name, 0.0)}
        how = self.how | {name: other.how[name] for name in higher}
        bandwidth = max(self.bandwidth, other.bandwidth)
        return replace(self, flops=self.flops | higher, bandwidth=bandwidth, how=how)


def dtype_name(dtype: torch.dtype) -> str:
    """As ``Peaks.flops`` and result files name it: "float32"."""
    return str(dtype).removeprefix("torch.")


def measure_peaks(device: str = "cpu", dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> Peaks:
    """Measure for about a second, with torch's number of threads on a CPU."""
    flops: dict[str, float] = {}
    how: dict[str, str] = {}
    for dtype in dtypes:
        name = dtype_name(dtype)
        flops[name], how[name] = _matmul_peak(dtype, device, flops.get("float32", 0.0))
        if dtype == torch.float32 and device == "cpu" and (found := _fma_peak(torch.get_num_threads())):
            flops[name], how[name] = max((found, "loop of multiply-adds"), (flops[name], how[name]))
        # 16-bit products in software are slower than float32 ones, and no engine needs them.
        elif device == "cpu" and flops[name] < flops.get("float32", 0.0):
            flops[name], how[name] = flops["float32"], "as float32: this processor has no faster arithmetic"
    bandwidth = _copy_bandwidth(device)
    how["bandwidth"] = f"torch copy of {_COPY_BYTES >> 20} MiB"
    launch = 0.0 if device == "cpu" else _KERNEL_SECONDS
    return Peaks(flops, bandwidth, launch, torch.get_num_threads(), how)


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


def _matmul_peak(dtype: torch.dtype, device: str, known: float = 0.0) -> tuple[float, str]:
    """The higher rate of two sizes, and where it is from.

    known: the rate of float32. If a small product on a CPU runs at less than an eighth of it, the large ones
    could take a minute and are not measured.
    """
    if known and device == "cpu" and _matmul_rate(_PROBE_SIZE, dtype, device) < known / 8:
        return 0.0, "not measured"
    sizes = (1024, 2048) if device == "cpu" else (4096, 8192)
    return max((_matmul_rate(size, dtype, device), f"torch matmul of {size} x {size}") for size in sizes)


def _matmul_rate(size: int, dtype: torch.dtype, device: str) -> float:
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    with torch.inference_mode():
        return 2 * size**3 / _best(partial(torch.matmul, left, right), device, times=3)


def _fma_peak(threads: int) -> float | None:
    """FLOP/s of a loop of vector multiply-adds; None without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "peak.c", Path(folder) / "peak.so"
        source.write_text(_SOURCE, encoding="utf-8")
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        built = subprocess.run([compiler, *flags, str(source), "-o", str(library)], capture_output=True)
        if built.returncode:
            return None
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
