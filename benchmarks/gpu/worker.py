"""A pytest that runs the tests it is told to, one at a time, and tells what came of each.

``-p benchmarks.gpu.worker``, by :mod:`benchmarks.gpu.pool`. Imports no torch before the tests do.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Generator, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

CHANNEL = "MST_CHECK_CHANNEL"
_COMPILERS = ("torch._dynamo.exc", "torch._inductor.", "triton.")
_COMPILING = ("_dynamo/convert_frame.py", "_inductor/compile_fx.py", "_inductor/async_compile.py", "/triton/compiler/")
_LENGTH = 600  # characters of a reason


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Worker(Connection(int(os.environ.pop(CHANNEL)))))


def raised_in_compilation(error: BaseException | None) -> bool:
    """Whether an exception, or one that it was raised from, is a compiler's or was raised by what it called."""
    while error is not None:
        if type(error).__module__.startswith(_COMPILERS) or any(map(_compiles, _files(error))):
            return True
        error = error.__cause__
    return False


def _files(error: BaseException) -> Iterator[str]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame.f_code.co_filename
        trace = trace.tb_next


def _compiles(file: str) -> bool:
    return any(part in file for part in _COMPILING)


class Worker:
    """The plugin: takes numbers of tests from its channel until that is closed."""

    def __init__(self, channel: Connection) -> None:
        self._channel = channel
        self._outcome, self._why, self._compiling = "right", "", 0.0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        if session.testsfailed:
            return None  # pytest tells what could not be imported
        self._channel.send({"tests": [item.nodeid for item in session.items], "on": _conditions()})
        while True:
            try:
                item = session.items[self._channel.recv()]
            except EOFError:
                return True
            self._outcome, self._why, self._compiling, start = "right", "", 0.0, time.monotonic()
            session.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
            lost = self._outcome not in ("right", "skipped") and _context_is_lost()
            seconds, compiling = round(time.monotonic() - start, 2), round(self._compiling, 2)
            why = "broke the GPU's context: " * lost + self._why
            result = {"outcome": self._outcome, "why": why, "seconds": seconds, "compiling": compiling}
            self._channel.send({"result": result, "last": lost})  # where it is lost, every test that follows would fail

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self) -> Generator[None, None, None]:
        yield
        if "torch" in sys.modules:  # each graph's time in Inductor since torch._dynamo.reset, between tests
            times = sys.modules["torch"]._dynamo.utils.compilation_time_metrics
            self._compiling = sum(times.get("compile_fx_inner", ()))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Generator[None, Any, None]:
        report = (yield).get_result()
        if self._outcome in ("right", "skipped") and not report.passed:
            error = None if call.excinfo is None else call.excinfo.value
            failed = "not compiled" if raised_in_compilation(error) else "wrong"
            self._outcome = "skipped" if report.skipped else failed
            self._why = f"{type(error).__name__}: {' '.join(str(error).split())}"[:_LENGTH]


def _conditions() -> str:
    """The card and the version of torch."""
    torch = sys.modules.get("torch")
    if torch is None:
        return ""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{card}, torch {torch.__version__}"


def _context_is_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
