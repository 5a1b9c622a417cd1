"""What an import needs, and the direction of imports between rooms."""

import ast
import runpy
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


def test_imports_without_extras() -> None:
    hidden = {"torchvision", "typer", "rich", "tqdm", "matplotlib", "sklearn", "onnx", "openvino"}
    code = HIDE.format(names=hidden) + "import dsp_kernels, dsp_pruning, dsp_module"
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


def test_environment_report(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_module("dsp_kernels.env", run_name="__main__")
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert {"python", "torch", "cpu", "executors", "dsp-kernels"} <= set(names)
