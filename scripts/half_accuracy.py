"""What float16 by AVX512-FP16 does to the answers of the real networks; its instructions computed in float.

Builds the tests' emulation (tests/run_cpu/half_emulation.py) and runs the 1,017 images. A few minutes. Usage:
DSP_SHARED=... python scripts/half_accuracy.py [--nets resnet20_g4 ...] [--half-terms 32]
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

import dsp_kernels
import dsp_kernels.run.cpu.extension
from dsp_kernels.tolerances import HALF_TERMS
from dsp_pruning import read_released

ROOT = Path(__file__).resolve().parents[1]
NETS = [f"resnet{depth}_g{groups}" for depth in (20, 56) for groups in (2, 3, 4)]


def measure(module: ModuleType, shared: Path, names: list[str], half_terms: int) -> None:
    """One line per network."""
    dsp_kernels.run.cpu.extension._load = lambda: (module, "")  # type: ignore[assignment]
    data = np.load(shared / "data" / "cifar10_subset.npz")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]))
    images = (torch.from_numpy(data["test_images"]).float() / 255 - mean) / std
    labels = torch.from_numpy(data["test_labels"])
    golden = np.load(shared / "golden" / "logits.npz")
    for name in names:
        packed = read_released(shared / "nets" / f"{name}.npz")
        fused = dsp_kernels.fuse(packed, images[:1], backend="cpu", dtype=torch.float16)
        assert ", float16]" in fused.explain()
        exact = torch.from_numpy(golden[f"{name}_all"])
        logits = torch.cat([fused(batch) for batch in images.split(64)])
        error = logits - exact
        print(
            f"{name}: sums of {half_terms} terms; right {int((exact.argmax(1) == labels).sum())} -> "
            f"{int((logits.argmax(1) == labels).sum())}, "
            f"changed {int((logits.argmax(1) != exact.argmax(1)).sum())}, "
            f"largest error {error.abs().max():.4f}, rms {error.square().mean().sqrt():.5f} "
            f"(logits reach {exact.abs().max():.1f})",
            flush=True,
        )


def main() -> None:
    """Every asked network. One length of the sums per process, which loads one build."""
    sys.path.insert(0, str(ROOT / "tests" / "native"))
    import half_emulation

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--half-terms", type=int, default=HALF_TERMS)
    arguments = parser.parse_args()
    reason = half_emulation.why_not()
    if reason:
        raise SystemExit(reason)
    shared = Path(os.environ.get("DSP_SHARED") or ROOT.parent / "shared")
    with tempfile.TemporaryDirectory() as folder:
        module = half_emulation.build(Path(folder), arguments.half_terms)
    measure(module, shared, arguments.nets, module.half_terms)


if __name__ == "__main__":
    main()
