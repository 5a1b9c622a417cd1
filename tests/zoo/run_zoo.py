"""Pack the whole zoo at two rates and write the table.

``python tests/zoo/run_zoo.py docs/zoo.md [names]``
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import zoo

RATES = (0.3, 0.7)
MOST_ERROR_64, MOST_ERROR_32 = 1e-10, 1e-4
_HEAD = """# The zoo

Made by `make test-zoo` (`tests/zoo/run_zoo.py`): every classification CNN of torchvision up to 150 M
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
    """Exit status 1 if a network cannot be packed or differs."""
    torch.set_num_threads(1)
    target, names = Path(sys.argv[1]), sys.argv[2:] or zoo.names()
    rows, failed = [], []
    for name in names:
        for rate in RATES:
            try:
                result = zoo.run(name, rate)
            except Exception as error:  # the table says which, and why
                failed.append(f"* {name} at {rate}: {type(error).__name__}: {error}")
                print(failed[-1], flush=True)
                continue
            rows.append(_row(result))
            print(rows[-1], flush=True)
            if not (result.error_64 <= MOST_ERROR_64 and result.error_32 <= MOST_ERROR_32):
                failed.append(f"* {name} at {rate}: differs by more than {MOST_ERROR_64} / {MOST_ERROR_32}")
    text = _HEAD + "\n".join(rows) + "\n"
    text += f"\n{len(names)} networks at {len(RATES)} rates; " + (
        "not packed:\n\n" + "\n".join(failed) if failed else "all packed."
    )
    target.write_text(text + "\n")
    return 1 if failed else 0


def _row(result: zoo.Result) -> str:
    counts: dict[str, int] = {}
    for barrier in result.barriers:
        counts[barrier] = counts.get(barrier, 0) + 1
    barriers = ", ".join(f"{count} x {what}" for what, count in counts.items()) or "none"
    cells = (
        *(result.name, f"{result.rate:.0%}", f"{result.removed} of {result.channels}"),
        *(f"{result.macs_before / 1e6:.1f} M", f"{result.macs_after / 1e6:.1f} M", str(result.folded)),
        *(barriers, f"{result.seconds:.1f}", f"{result.error_64:.1e}", f"{result.error_32:.1e}"),
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
