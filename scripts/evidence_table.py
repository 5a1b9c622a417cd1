"""Put the table of a finished (or unfinished) comparison into the docs, between its two marks.

``python scripts/evidence_table.py FOLDER docs/algorithm.md``: FOLDER is the ``--out`` of
``python -m dsp_pruning.recipes.compare_modes``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from dsp_kernels.whole_file import write_text
from dsp_pruning.recipes.compare_modes import TABLE

BEGIN, END = "<!-- evidence: begin -->", "<!-- evidence: end -->"


def main() -> int:
    """Exit status 1 where the page has no marks."""
    table, page = (Path(sys.argv[1]) / TABLE).read_text(encoding="utf-8"), Path(sys.argv[2])
    before, found, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        print(f"{page} has no {BEGIN} ... {END}")
        return 1
    write_text(page, f"{before}{BEGIN}\n{table}{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
