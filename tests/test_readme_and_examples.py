"""The examples of README and docstrings run, and every public function and class has one."""

import doctest
import importlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

README = Path(__file__).resolve().parents[1] / "README.md"
PAGES = [README, *sorted((README.parent / "docs" / "guide").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {"__name__": page.stem}
    threads = torch.get_num_threads()
    for number, block in enumerate(blocks):
        if "import torch_pruning" in block and importlib.util.find_spec("torch_pruning") is None:
            pytest.skip("torch-pruning is missing: pip install torch-pruning")
        exec(compile(block, f"{page.name}, python block {number}", "exec"), names)
    torch.set_num_threads(threads)


def test_the_notebook_runs_and_holds_no_outputs(tmp_path: Path) -> None:
    notebook = README.parent / "docs" / "guide" / "quickstart.ipynb"
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    if importlib.util.find_spec("nbmake") is None:
        pytest.skip("nbmake is missing: pip install nbmake")
    shutil.copy(notebook, tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "--nbmake", "--nbmake-timeout=1200", notebook.name]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=1500)


def test_the_guide_shows_code() -> None:
    assert sum("```python" in page.read_text(encoding="utf-8") for page in PAGES) >= 6


def test_set_up_commands_are_targets_of_the_makefile() -> None:
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^make (\w+)", README.read_text(encoding="utf-8"), re.MULTILINE)
    assert {"demo", "test"} <= set(commands)
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command


PUBLIC_MODULES = ["dsp_kernels", "dsp_pruning", "dsp_pruning.export", "dsp_pruning.models"]
PUBLIC = [(module, name) for module in PUBLIC_MODULES for name in importlib.import_module(module).__all__]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[f"{module}.{name}" for module, name in PUBLIC])
def test_the_docstring_has_an_example_that_runs(
    module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    subject = getattr(importlib.import_module(module), name)
    tests = [test for test in doctest.DocTestFinder(exclude_empty=False).find(subject, name) if test.examples]
    assert tests, f"{module}.{name} has no example"
    for test in tests:
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        runner.run(test)
        assert runner.failures == 0, f"the example of {test.name} fails; run python -m doctest on its module"
