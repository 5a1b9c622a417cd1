"""Without the extension these tests fail where a compiler could have built it, and are skipped elsewhere."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from compiled import EMULATED, emulated
from isas import ISAS, WORD_ISAS

from dsp_kernels.run.cpu import extension
from dsp_kernels.run.cpu.extension import native, why_missing

# These pass without the extension too.
ALWAYS = ("test_native_build.py", "test_the_extension_is_built_if_there_is_a_compiler")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if native() is not None or shutil.which("g++") or shutil.which("clang++"):
        return
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not any(name in item.nodeid for name in ALWAYS):
            item.add_marker(pytest.mark.skip(reason=f"there is no C++ compiler; {why_missing()}"))


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def replace_extension(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType | None, str], None]:
    """Makes another module the native extension, or none with a reason, for one test."""

    def replace(module: ModuleType | None, reason: str = "") -> None:
        monkeypatch.setattr(extension, "_load", lambda: (module, reason))

    return replace


@pytest.fixture
def use_isa(
    monkeypatch: pytest.MonkeyPatch, replace_extension: Callable[[ModuleType | None, str], None]
) -> Callable[[str], None]:
    """Selects an instruction set for one test."""

    def use(name: str) -> None:
        if name in EMULATED:
            replace_extension(emulated(), "")
        monkeypatch.setenv("DSP_KERNELS_ISA", name)

    return use


@pytest.fixture(params=WORD_ISAS)
def word_isa(request: pytest.FixtureRequest, use_isa: Callable[[str], None]) -> str:
    """Also with AMX, if need be emulated."""
    use_isa(request.param)
    name: str = request.param
    return name


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, use_isa: Callable[[str], None]) -> str:
    """Runs the test on every tested instruction set."""
    use_isa(request.param)
    name: str = request.param
    return name
