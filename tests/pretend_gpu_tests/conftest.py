"""One interpreter for all of these tests: starting it takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pretend_gpu import Interpreter


@pytest.fixture(scope="package")
def interpreter() -> Iterator[Interpreter]:
    with Interpreter() as running:
        yield running
