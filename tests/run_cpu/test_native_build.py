"""What the build makes where it cannot make everything: a pure Python package and one line that says why."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dsp_kernels.op.torch_op import OP_NAME

ROOT = Path(__file__).resolve().parents[2]
# Runs setup.py as pip does, with something of the machine taken away first.
RUN = (
    "import sys, sysconfig, runpy\n{change}\n"
    "sys.argv = ['setup.py', '-q', 'build_ext', '--build-lib', {target!r}, '--build-temp', {target!r}]\n"
    "runpy.run_path('setup.py', run_name='__main__')"
)

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler to leave unused"
)


def build(tmp_path: Path, change: str = "", **environment: str) -> tuple[str, list[str]]:
    """What the build said on stderr, and the files that it made."""
    code = RUN.format(change=change, target=str(tmp_path))
    environment = {**os.environ, "DSP_KERNELS_CUDA": "0", **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("dsp-kernels:")]
    assert "(the CUDA kernels): DSP_KERNELS_CUDA is 0" in lines.pop()
    assert len(lines) == 1
    return lines[0], [path.name for path in tmp_path.rglob("_C*") if path.suffix == ".so"]


def test_without_a_compiler(tmp_path: Path) -> None:
    line, made = build(tmp_path, PATH=str(tmp_path), CXX="no-such-compiler")
    assert "no C++ compiler" in line
    assert not made


@needs_compiler
def test_without_python_headers(tmp_path: Path) -> None:
    change = (
        "paths = sysconfig.get_paths()\n"
        f"sysconfig.get_paths = lambda *a, **k: {{**paths, 'include': {str(tmp_path)!r}}}"
    )
    line, made = build(tmp_path, change)
    assert "no Python headers" in line
    assert not made


@needs_compiler
def test_without_pybind11(tmp_path: Path) -> None:
    line, made = build(tmp_path, "sys.modules['pybind11'] = None")
    assert "pybind11 is not installed" in line
    assert not made


def test_left_out_by_hand(tmp_path: Path) -> None:
    line, made = build(tmp_path, DSP_KERNELS_CPU="0")
    assert "DSP_KERNELS_CPU" in line
    assert not made


def pretended_compiler(tmp_path: Path) -> tuple[str, Path]:
    """A compiler that makes empty files at once, and the file that lists what it was asked for."""
    log, script = tmp_path / "asked", tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\ncase " $* " in *" -x "*) exit 1;; esac\n'  # knows nothing optional
        'while [ "$1" != -o ]; do shift; done\n: > "$2"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    return str(script), log


def test_with_torch_the_op_is_registered_natively(tmp_path: Path) -> None:
    compiler, log = pretended_compiler(tmp_path)
    line, made = build(tmp_path, CXX=compiler)
    assert line.endswith("built dsp_kernels._C, the native CPU kernels and the torch op")
    assert len(made) == 1
    assert OP_NAME in log.read_text(encoding="utf-8")


def test_without_torch_python_registers_the_op(tmp_path: Path) -> None:
    """As in pip's isolated builds, where torch is missing."""
    compiler, log = pretended_compiler(tmp_path)
    line, made = build(tmp_path, "sys.modules['torch'] = None", CXX=compiler)
    assert "Python registers the torch op, because torch is not importable" in line
    assert "--no-build-isolation" in line
    assert len(made) == 1
    assert "torch_op.cpp" not in log.read_text(encoding="utf-8")


def test_a_compiler_that_does_not_know_16_bit(tmp_path: Path) -> None:
    """The pretended one fails when it is asked; the other instruction sets are built all the same."""
    compiler, log = pretended_compiler(tmp_path)
    _, made = build(tmp_path, CXX=compiler)
    assert len(made) == 1
    asked = [line for line in log.read_text(encoding="utf-8").splitlines() if " -x " not in line]
    for name in ("bf16", "fp16"):
        assert any(f"kernels/avx512_{name}.cpp" in line for line in asked)
        assert not any(f"{name} " in line or f"AVX512_{name.upper()}" in line for line in asked)
