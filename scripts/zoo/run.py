"""Take timm's families through all stages, pack torchvision's networks, and print the tables.

``python scripts/zoo/run.py --out docs/notes/zoo.md``; with names, only these networks (timm's as timm/NAME).
Exit status 1 if a network fails or is not exact.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import networks
import stages
import torch

_STAGES = ("packed", "fused", "saved", "onnxruntime", "openvino")
RATES, MOST_ERROR_64, MOST_ERROR_32 = (0.3, 0.7), 1e-10, 1e-4
_HEAD = """# The zoo

Made by `make test-zoo` (`scripts/zoo/run.py`).

## Families of timm, from wrapper to engines

One standard network of each family, chosen before the first run; of LeViT only the convolutional stem. Random
weights, norms that are not the identity, 1x3x128x128, `PruneWrapper(G=2).initialize(0.5)` with random groups.
Errors are the largest difference over the largest output: of the packed network against the masked one in
float64, of the others against the packed one in float32. Plain: steps of `fuse` before the head that run as
plain PyTorch, of all steps. Seconds: process time of `pack` and `fuse`, one thread, their checks included.

| network | packed | fused | plain | saved | ONNX Runtime | OpenVINO | pack | fuse |
|---|---|---|---|---|---|---|---|---|
%s

%s

## Networks of torchvision, packed

Every classification CNN up to 150 M parameters and two networks for segmentation with their auxiliary heads.
Random weights, random group masks on every dense convolution but the first (that share of every group's
channels and of the filters), random norms and biases; one half of the pruned filters keeps a nonzero shift.
Errors are from the masked network, at two input sizes. MACs are those of one small image. Constants folded:
input channels that became part of a reader's bias. Barriers: operations around which channels stayed that
nothing needs. Seconds: `pack` in float64, one thread, its own check included.

| network | rate | channels removed | MACs before | MACs after | constants folded | barriers | seconds \
| error float64 | error float32 |
|---|---|---|---|---|---|---|---|---|---|
%s
"""


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, help="write the tables there too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = given.names or [*(f"timm/{name}" for name in networks.TIMM), *networks.names()]
    families: list[str] = []
    packed: list[str] = []
    failed = []
    for name in names:
        for rate in (None,) if name.startswith("timm/") else RATES:
            label = name if rate is None else f"{name} at {rate}"
            try:
                fine, cells = _family(name) if rate is None else _packed(name, rate)
            except Exception as error:  # the table says which network, and why
                failed.append(f"* {label}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
                print(failed[-1], flush=True)
                continue
            rows = families if rate is None else packed
            rows.append(f"| {name} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
            if not fine:
                failed.append(f"* {label}: out of bounds")
    end = "Failed:\n\n" + "\n".join(failed) if failed else "Every row is within its bounds."
    if given.out:
        given.out.write_text(_HEAD % ("\n".join(families), end, "\n".join(packed)))
    return 1 if failed else 0


def _family(name: str) -> tuple[bool, list[str]]:
    """Whether a network of timm is within all bounds, and its row."""
    made = stages.run_all(name)
    shown = [f"{made.errors[stage]:.1e}" if stage in made.errors else made.failed[stage] for stage in _STAGES]
    plain = f"{made.plain} of {made.steps}"
    seconds = [made.seconds.get(what, 0.0) for what in ("pack", "fuse")]
    return made.within_bounds, [*shown[:2], plain, *shown[2:], *(f"{one:.1f}" for one in seconds)]


def _packed(name: str, rate: float) -> tuple[bool, list[str]]:
    """Whether a network of torchvision is packed exactly, and its row."""
    made = networks.pack_masked(name, rate)
    reasons = [barrier.reason for barrier in made.report.barriers if barrier.kept]
    # The operation that a barrier's reason names.
    barriers = Counter(text.partition("(")[2].partition(",")[0].strip() or text for text in reasons)
    return made.error_64 <= MOST_ERROR_64 and made.error_32 <= MOST_ERROR_32, [
        f"{rate:.0%}",
        *(f"{made.removed} of {made.channels}", f"{made.macs_before / 1e6:.1f} M"),
        *(f"{made.macs_after / 1e6:.1f} M", str(made.report.folded)),
        ", ".join(f"{count} x {what}" for what, count in barriers.items()) or "none",
        *(f"{made.seconds:.1f}", f"{made.error_64:.1e}", f"{made.error_32:.1e}"),
    ]


if __name__ == "__main__":
    sys.exit(main())
