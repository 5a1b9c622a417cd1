"""What an import needs, and the direction of imports between rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {  # folder -> the packages it may import
    "dsp_kernels": set(),
    "python/dsp_pruning": {"dsp_kernels"},
    "benchmarks": {"dsp_kernels", "dsp_pruning"},
    "python/dsp_cli": {"dsp_kernels", "dsp_pruning", "dsp_benchmarks"},
}
NAMES = {"dsp_kernels", "dsp_pruning", "dsp_benchmarks", "dsp_cli", "benchmarks", "dsp_module"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    own = room.split("/")[-1].replace("benchmarks", "dsp_benchmarks")
    for file in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules = [node.module]
            for module in modules:
                top = module.split(".")[0]
                if top in NAMES and top != own:
                    assert top in ROOMS[room], f"{file.relative_to(ROOT)} imports {module}"


HIDE = """
import importlib.abc, sys
class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"{{name}} is hidden", name=name)
sys.meta_path.insert(0, Hidden())
"""


@pytest.mark.parametrize("package", ["dsp_kernels", "dsp_pruning", "dsp_module"])
def test_imports_without_extras(package: str) -> None:
    hidden = {"torchvision", "typer", "rich", "tqdm", "matplotlib", "sklearn", "onnx", "openvino"}
    code = HIDE.format(names=hidden) + f"import {package}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_runtime_needs_neither_triton_nor_the_training_half() -> None:
    hidden = {"triton", "torchvision", "dsp_pruning", "dsp_cli", "dsp_benchmarks"}
    code = HIDE.format(names=hidden) + (
        "import torch, dsp_kernels as d\n"
        "s = d.GroupStructure.build(3, 4, [([0, 2], [3, 1])])\n"
        "net = torch.nn.Sequential(d.PackedConv2d(s, 3, padding=1), torch.nn.BatchNorm2d(4)).eval()\n"
        "x = torch.randn(2, 3, 8, 8)\n"
        "assert torch.allclose(d.fuse(net, x)(x), net(x), atol=1e-5)\n"
        "y = net(x); assert torch.allclose(d.swap(net)(x), y, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_environment_report() -> None:
    command = [sys.executable, "-m", "dsp_kernels.env"]
    text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    for name in ("python", "torch", "cpu", "executors", "dsp-kernels"):
        assert any(line.startswith(name) for line in text.splitlines()), name
