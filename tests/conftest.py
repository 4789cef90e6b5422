"""Settings of the whole suite: deterministic, two threads, compile caches of its own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch
from mst_compile.kernels.cpu import build

if TYPE_CHECKING:
    from pretend_gpu import Interpreter

# The C++ kernels are keyed by their sources and may be shared between runs; Inductor's caches must not be: a test that
# is served code of an earlier run proves nothing. Workers of one run share them.
os.environ.setdefault("MST_COMPILE_CACHE_DIR", str(build.cache_dir()))
# Which product is faster depends on the machine and its load: tests that are not about the choice pin it.
os.environ.setdefault("MST_COMPILE_DENSE_THRESHOLD", "0.8")
if "PYTEST_XDIST_WORKER" not in os.environ:
    _inductor_cache = tempfile.mkdtemp(prefix="mst-tests-")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _inductor_cache
    atexit.register(shutil.rmtree, _inductor_cache, ignore_errors=True)

torch.set_num_threads(min(2, torch.get_num_threads()))

_common = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck), "print_blob": True}
hypothesis.settings.register_profile("ci", derandomize=True, database=None, max_examples=60, **_common)
hypothesis.settings.register_profile("explore", max_examples=600, **_common)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_configure(config: pytest.Config) -> None:
    # Many models here hold near misses on purpose; that the warning comes has a test of its own.
    config.addinivalue_line("filterwarnings", "ignore:.*in dense products, which is correct:mst_compile.MSTWarning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Groups first: one worker has to do all of each, and the other shall not wait for it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("xdist_group") is None)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Refuse to run where pytest-xdist does not keep groups together: each worker would do the group's work anew."""
    if getattr(session.config.option, "loadgroup", False):
        grouped = [item.nodeid for item in session.items if item.get_closest_marker("xdist_group")]
        if not all("@" in nodeid for nodeid in grouped):
            raise pytest.UsageError("this pytest-xdist forgets groups of tests under this pytest: take pytest 9.1")


@pytest.fixture(autouse=True)
def _clean_slate() -> Iterator[None]:
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """One interpreter of GPU kernels for all tests: starting it takes seconds."""
    from pretend_gpu import Interpreter

    with Interpreter(preload=("mst_compile.lowering.inductor",)) as running:
        yield running


@pytest.fixture
def tf32(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether float32 products on a GPU may run in TF32; parametrised indirectly."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Products run on two threads; where tests run side by side, their processes begin with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
