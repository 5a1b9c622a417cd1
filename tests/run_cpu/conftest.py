"""Without the extension these tests fail where a compiler could have made it, and are skipped elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dsp_kernels.run.cpu.extension import native, why_missing

# These hold without the extension too.
ALWAYS = ("test_native_build.py", "test_the_extension_is_built_where_a_compiler_is")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if native() is not None or shutil.which("g++") or shutil.which("clang++"):
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not any(name in item.nodeid for name in ALWAYS):
            item.add_marker(pytest.mark.skip(reason=f"there is no C++ compiler; {why_missing()}"))
