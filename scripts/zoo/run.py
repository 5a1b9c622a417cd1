"""Pack every network of the zoo, or the named ones, and print a table.

``python scripts/zoo/run.py --out docs/notes/zoo.md``. Exit status 1 if a network fails or is not exact.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import networks
import torch

RATES, MOST_ERROR_64, MOST_ERROR_32 = (0.3, 0.7), 1e-10, 1e-4
_HEAD = """# The zoo

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
"""


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--out", type=Path, help="write the table there too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows, failed = [], []
    names = given.names or networks.names()
    for name in names:
        for rate in RATES:
            try:
                made = networks.pack_masked(name, rate)
            except Exception as error:  # the table says which network, and why
                failed.append(f"* {name} at {rate}: {type(error).__name__}: {error}")
                print(failed[-1], flush=True)
                continue
            rows.append(f"| {' | '.join((name, f'{rate:.0%}', *_cells(made)))} |")
            print(rows[-1], flush=True)
            if not (made.error_64 <= MOST_ERROR_64 and made.error_32 <= MOST_ERROR_32):
                failed.append(f"* {name} at {rate}: out of bounds")
    end = "failed:\n\n" + "\n".join(failed) if failed else f"all of {len(rows)} rows are within bounds."
    if given.out:
        given.out.write_text(_HEAD + "\n".join(rows) + f"\n\n{len(names)} networks; {end}\n")
    return 1 if failed else 0


def _cells(made: networks.Packed) -> tuple[str, ...]:
    reasons = [barrier.reason for barrier in made.report.barriers if barrier.kept]
    # The operation that a barrier's reason names.
    barriers = Counter(text.partition("(")[2].partition(",")[0].strip() or text for text in reasons)
    return (
        *(f"{made.removed} of {made.channels}", f"{made.macs_before / 1e6:.1f} M"),
        *(f"{made.macs_after / 1e6:.1f} M", str(made.report.folded)),
        ", ".join(f"{count} x {what}" for what, count in barriers.items()) or "none",
        *(f"{made.seconds:.1f}", f"{made.error_64:.1e}", f"{made.error_32:.1e}"),
    )


if __name__ == "__main__":
    sys.exit(main())
