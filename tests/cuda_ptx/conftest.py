"""The process in which kernels run as PTX."""

from collections.abc import Iterator

import pytest
from child import Child
from ptx.build import build, why_not


@pytest.fixture(scope="session")
def child() -> Iterator[Child]:
    if reason := why_not():
        pytest.skip(reason)
    build()
    made = Child()
    yield made
    made.close()
