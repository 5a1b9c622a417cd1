"""Every public function and class has a short example in its docstring, and the examples run."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

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
