"""Take timm's families through all stages, pack torchvision's networks, and print the rows of its tables.

``python scripts/zoo/run.py``; with names, only these networks (timm's as timm/NAME). Exit status 1 if a
network fails or is not exact. docs/notes/zoo.md holds the tables.
"""

import argparse
import sys
from collections import Counter

import networks
import stages
import torch

_STAGES = ("packed", "fused", "saved", "onnxruntime", "openvino")
RATES, MOST_ERROR_64, MOST_ERROR_32 = (0.3, 0.7), 1e-10, 1e-4


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = given.names or [*(f"timm/{name}" for name in networks.TIMM), *networks.names()]
    failed = False
    for name in names:
        for rate in (None,) if name.startswith("timm/") else RATES:
            try:
                fine, cells = _family(name) if rate is None else _packed(name, rate)
                print(f"| {name} | {' | '.join(cells)} |{'' if fine else ' out of bounds'}", flush=True)
            except Exception as error:
                fine, reason = False, " ".join(str(error).split())[:200]
                label = name if rate is None else f"{name} at {rate}"
                print(f"{label}: {type(error).__name__}: {reason}", flush=True)
            failed |= not fine
    return int(failed)


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
