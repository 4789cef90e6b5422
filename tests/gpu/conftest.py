"""Tests that run the kernels on a real GPU, collected only where there is one.

    python -m benchmarks.gpu check          # in processes of its own, within three minutes, with a table
    python -m pytest tests/gpu -n 12        # the same tests in the same order

``MST_TESTS_DEVICE=cpu`` runs the same tests on the CPU, and so its kernels: that tests the tests.

Minutes on a GPU are few: tests come in the order of their marker ``rank``, what finds most first, those without last.
0 is one case of each template, dtype and block; 1 a compiled layer; 2 attention in each pattern; 3 a GPT through a
schedule; 4 process groups; 5 CUDA graphs; 6 max-autotune; 7 other optimizers; 8 float16; 9 sizes beyond 32 bits.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import mst_compile.lowering.inductor  # noqa: F401  (registers the lowerings)
import pytest
import torch
from gpu_cases import TUNED
from mst_compile.lowering import compat

DEVICE = os.environ.get("MST_TESTS_DEVICE") or ("cuda" if torch.cuda.is_available() else "")
if not DEVICE:
    collect_ignore_glob = ["test_*.py"]
elif "mst" not in torch._dynamo.list_backends():  # a checkout that is not installed
    from mst_compile.graph.backend import mst

    torch._dynamo.register_backend(mst, name="mst")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "rank(number): place of a test on a GPU among the others, see tests/gpu/conftest.py"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests of this folder and sort them by rank, on the places that they have among all tests."""
    places = [i for i, item in enumerate(items) if Path(__file__).parent in item.path.parents]
    for place, item in zip(places, sorted((items[i] for i in places), key=_rank), strict=True):
        item.add_marker("gpu")
        items[place] = item


def _rank(item: pytest.Item) -> float:
    """A test's rank, its own before that of all its parameters."""
    return min((marker.args[0] for marker in item.iter_markers("rank")), default=math.inf)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, None, None]:
    """End a worker process whose GPU context a kernel has broken: every test that follows would fail in it.

    pytest-xdist reports the test as crashed and starts another worker; what was raised is printed.
    """
    yield
    if call.excinfo is not None and DEVICE == "cuda" and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            lines = traceback.format_exception(call.excinfo.value)
            print(f"{item.nodeid} broke the GPU's context:\n", *lines[-3:], file=sys.__stderr__, flush=True)
            os._exit(1)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The device, its free memory full of NaN: what a kernel reads beside its operands shows."""
    found = torch.device(DEVICE)
    if found.type == "cuda":
        for bytes_each, count in ((1 << 10, 64), (1 << 19, 32), (1 << 24, 16)):
            held = [torch.full((bytes_each // 4,), torch.nan, device=found) for _ in range(count)]
            del held
    yield found
    if found.type == "cuda":
        torch.cuda.empty_cache()


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[int]]]:
    """Have every product compiled with one choice of the autotuner's, the last of ours where there are fewer.

    The function returned takes the number of the choice, and returns a list of how many were asked for each time.
    """
    with contextlib.ExitStack() as stack:

        def use(choice: int) -> list[int]:
            asked: list[int] = []
            select = compat.select

            def one(name: str, choices: list[Any], *args: Any, **kwargs: Any) -> Any:
                # Attention has no dense product among its choices; the others mark which are ours.
                own = [c for c in choices if hasattr(c, "mst_product")] or choices
                if name != "mst_grad_weight_sum":  # of which there is one
                    asked.append(len(own))
                return select(name, [own[min(choice, len(own) - 1)]], *args, **kwargs)

            monkeypatch.setattr(compat, "select", one)
            # All choices are offered; compiled code is cached by its graph, which is the same for all of them.
            stack.enter_context(torch._inductor.config.patch(**TUNED, force_disable_caches=True))
            return asked

        yield use
