"""What the build makes where it cannot make everything: a pure Python package and one line that says why."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Runs setup.py as pip does, with something of the machine taken away first.
RUN = (
    "import sys, sysconfig, runpy\n{change}\n"
    "sys.argv = ['setup.py', '-q', 'build_ext', '--build-lib', {target!r}, '--build-temp', {target!r}]\n"
    "runpy.run_path('setup.py', run_name='__main__')"
)


def build(tmp_path: Path, change: str = "", **environment: str) -> tuple[str, list[str]]:
    """What the build said on stderr, and the files that it made."""
    code = RUN.format(change=change, target=str(tmp_path))
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("dsp-kernels:")]
    assert len(lines) == 1
    return lines[0], [path.name for path in tmp_path.rglob("_C*") if path.suffix == ".so"]


def test_without_a_compiler(tmp_path: Path) -> None:
    line, made = build(tmp_path, PATH=str(tmp_path), CXX="no-such-compiler")
    assert "no C++ compiler" in line
    assert not made


def test_without_python_headers(tmp_path: Path) -> None:
    change = (
        "paths = sysconfig.get_paths()\n"
        f"sysconfig.get_paths = lambda *a, **k: {{**paths, 'include': {str(tmp_path)!r}}}"
    )
    line, made = build(tmp_path, change)
    assert "no Python headers" in line
    assert not made


def test_without_pybind11(tmp_path: Path) -> None:
    line, made = build(tmp_path, "sys.modules['pybind11'] = None")
    assert "pybind11 is not installed" in line
    assert not made


def test_left_out_by_hand(tmp_path: Path) -> None:
    line, made = build(tmp_path, DSP_KERNELS_CPU="0")
    assert "DSP_KERNELS_CPU" in line
    assert not made
