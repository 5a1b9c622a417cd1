"""Pack, learn or prune every network of the zoo and print a table.

``python scripts/zoo/run.py pack --out docs/notes/zoo.md`` (or ``learn``, ``prune``),
then names, or none for all.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import networks
import torch

PACKED_RATES, MOST_ERROR_64, MOST_ERROR_32 = (0.3, 0.7), 1e-10, 1e-4
PRUNED_RATE, NEAR = 0.5, 0.5  # percentage points: how far above the rate one threshold may end
_HEADS = {
    "pack": """# The zoo

Made by `make test-zoo` (`scripts/zoo/run.py`): every classification CNN of torchvision up to 150 M
parameters, two networks for segmentation with their auxiliary heads, ten of timm. Random weights, random
group masks on every dense convolution but the first (that share of every group's channels and of the
filters), random norms and biases; one half of the pruned filters keeps a nonzero shift. The packed network
is compared with the masked one at two input sizes; an error is the largest difference over the largest
output. MACs are those of one small image. Constants folded: input channels that became part of a reader's
bias. Barriers: operations around which channels stayed that nothing needs. Seconds: `pack` in float64, one
thread, its own check included.

| network | rate | channels removed | MACs before | MACs after | constants folded | barriers | seconds \
| error float64 | error float32 |
|---|---|---|---|---|---|---|---|---|---|
""",
    "learn": "| network | input | convs | that learn |\n|---|---:|---:|---:|\n",
    "prune": "| network | layers | pruned FLOPs | pruned params | by own mask | seconds to prune |\n"
    "|---|---:|---:|---:|---:|---:|\n",
}


def main() -> int:
    """Exit status 1 if a network fails, or misses its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=_HEADS)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, help="write the table there too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, failed = [], []
    names = given.names or networks.names()
    for name in names:
        for rate in PACKED_RATES if given.what == "pack" else (PRUNED_RATE,):
            try:
                cells, good = {"pack": _pack, "learn": _learn, "prune": _prune}[given.what](name, rate)
            except Exception as error:  # the table says which network, and why
                failed.append(f"* {name} at {rate}: {type(error).__name__}: {error}")
                print(failed[-1], flush=True)
                continue
            rows.append(f"| {' | '.join((name, *cells))} |")
            print(rows[-1], flush=True)
            if not good:
                failed.append(f"* {name} at {rate}: out of bounds")
    end = "failed:\n\n" + "\n".join(failed) if failed else f"all of {len(rows)} rows are within bounds."
    text = _HEADS[given.what] + "\n".join(rows) + f"\n\n{len(names)} networks; {end}\n"
    if given.out:
        given.out.write_text(text)
    return 1 if failed else 0


def _pack(name: str, rate: float) -> tuple[tuple[str, ...], bool]:
    result = networks.pack_masked(name, rate)
    barriers = ", ".join(f"{count} x {what}" for what, count in Counter(result.barriers).items()) or "none"
    cells = (
        *(f"{rate:.0%}", f"{result.removed} of {result.channels}"),
        *(f"{result.macs_before / 1e6:.1f} M", f"{result.macs_after / 1e6:.1f} M", str(result.folded)),
        *(barriers, f"{result.seconds:.1f}", f"{result.error_64:.1e}", f"{result.error_32:.1e}"),
    )
    return cells, result.error_64 <= MOST_ERROR_64 and result.error_32 <= MOST_ERROR_32


def _learn(name: str, _: float) -> tuple[tuple[str, ...], bool]:
    networks.learn(name, "none")
    layers = networks.learn(name, "exact").layers
    return (str(networks.side(name)), str(len(layers.convs)), str(len(layers.chosen))), True


def _prune(name: str, rate: float) -> tuple[tuple[str, ...], bool]:
    report, seconds = networks.prune(name, rate)
    alone = sum("own mask" in row["note"] for row in report.layers)
    percent = f"{report.pruned_flops:.2f} %", f"{report.pruned_params:.2f} %"
    cells = (str(len(report.layers)), *percent, str(alone), f"{seconds:.1f}")
    return cells, 0 <= report.pruned_flops - 100 * rate < NEAR


if __name__ == "__main__":
    sys.exit(main())
