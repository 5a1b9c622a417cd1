"""A training run may be killed at any moment and loses nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_run_that_is_killed_twice_ends_as_one_left_alone() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "kill_test.py"), "--kills", "2", "--epochs", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stages that differ: none" in done.stdout
