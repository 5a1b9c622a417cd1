"""The build without a prerequisite: a pure Python package, and one line that says why."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Runs setup.py as pip does, after a change that hides a prerequisite.
RUN = (
    "import sys, sysconfig, runpy\n{change}\n"
    "sys.argv = ['setup.py', '-q', 'build_ext', '--build-lib', {target!r}, '--build-temp', {target!r}]\n"
    "runpy.run_path('setup.py', run_name='__main__')"
)

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler"
)


def build(tmp_path: Path, change: str = "", **environment: str) -> tuple[str, list[str]]:
    """The build's own line on stderr, and the libraries that it made."""
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
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            "paths = sysconfig.get_paths()\n"
            "sysconfig.get_paths = lambda *a, **k: {**paths, 'include': '/none'}",
            "no Python headers",
        ),
        ("sys.modules['pybind11'] = None", "pybind11 is not installed"),
        ("import os; os.environ['DSP_KERNELS_CPU'] = '0'", "DSP_KERNELS_CPU is 0"),
    ],
    ids=["headers", "pybind11", "disabled"],
)
def test_without_another_prerequisite(change: str, reason: str, tmp_path: Path) -> None:
    line, made = build(tmp_path, change)
    assert reason in line
    assert not made


def fake_compiler(tmp_path: Path) -> tuple[str, Path]:
    """A compiler that writes empty files, and the log of its command lines."""
    log, script = tmp_path / "commands", tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\necho "$@" >> {log}\ncase " $* " in *" -x "*) exit 1;; esac\n'  # no 16 bit
        'while [ "$1" != -o ]; do shift; done\n: > "$2"\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    return str(script), log


def test_torch_is_not_needed(tmp_path: Path) -> None:
    """As in pip's isolated builds, where torch is missing."""
    compiler, _ = fake_compiler(tmp_path)
    line, made = build(tmp_path, "sys.modules['torch'] = None", CXX=compiler)
    assert line.endswith("built dsp_kernels._C, the native CPU kernels")
    assert len(made) == 1


def test_a_compiler_that_does_not_support_16_bit(tmp_path: Path) -> None:
    """The fake compiler fails the probes; the other instruction sets are built."""
    compiler, log = fake_compiler(tmp_path)
    _, made = build(tmp_path, CXX=compiler)
    assert len(made) == 1
    commands = [line for line in log.read_text(encoding="utf-8").splitlines() if " -x " not in line]
    for name in ("bf16", "fp16", "amx"):
        assert any(f"kernels/avx512_{name}.cpp" in line for line in commands)
        assert not any(f"{name} " in line or f"AVX512_{name.upper()}" in line for line in commands)
