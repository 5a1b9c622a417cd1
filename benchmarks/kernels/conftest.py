"""The ``--batch`` option of the single-op benchmarks."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--batch``."""
    parser.addoption("--batch", type=int, default=8, help="batch size of the single-op benchmarks")


@pytest.fixture
def batch(request: pytest.FixtureRequest) -> int:
    """The batch size to run."""
    return int(request.config.getoption("--batch"))
