"""Damaged files in a process with limited memory; ``make fuzz`` is the long run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "safety" / "fuzz_files.py"


def test_damaged_files_load_whole_or_not_at_all() -> None:
    command = [sys.executable, str(SCRIPT), "--count", "500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("500 files")
    for outcome in ("'refused': ", "'loaded': "):  # both happen, so both were tried
        assert int(done.stdout.split(outcome)[1].split(",")[0].split("}")[0]) > 5
