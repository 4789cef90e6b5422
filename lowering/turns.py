"""Who measures on a machine: one process at a time, as two would measure each other.

Turns make measurements better, and nothing depends on them: where there are no locks, or others hold on to theirs, one
measures all the same. What a process waits for in all its life is limited by about what measuring takes it, so that one
that was stopped with a turn in its hand holds nobody up for long; with one that dies its turn is over at once.
"""

from __future__ import annotations

import contextlib
import platform
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from mst_compile.kernels.cpu.folder import open_cache_dir
from mst_compile.kernels.cpu.locks import lock, unlock

SECONDS = 5.0  # about what the products of a model take to measure
_POLL_SECONDS = 0.01
LOADED = 0.75  # up to a quarter of the calls disturbed, the least of their times are those of a quiet machine
_SLICE = 0.005  # seconds for which a scheduler puts somebody aside on a quiet machine too


class Turns:
    """The turns of this process.

    Args:
        seconds: to wait for them, all in all.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self._left, self._here = seconds, threading.local()

    @contextlib.contextmanager
    def take(self, is_needless: Callable[[], bool]) -> Iterator[None]:
        """Measure within: nobody else does then, or the time to wait is over, or there is no need to measure.

        Args:
            is_needless: asked while others are waited for, who may measure the same.
        """
        if getattr(self._here, "held", False):  # what is measured asks for measurements
            yield
            return
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                file = stack.enter_context(open(_file(), "a"))
                if self._is_locked(file.fileno(), is_needless):
                    stack.callback(unlock, file.fileno())
            try:
                self._here.held = True
                yield
            finally:
                self._here.held = False

    def _is_locked(self, file: int, is_needless: Callable[[], bool]) -> bool:
        begun = time.monotonic()
        try:
            while not (held := lock(file)):
                if time.monotonic() - begun > self._left or is_needless():
                    break
                time.sleep(_POLL_SECONDS)
        finally:
            self._left = max(0.0, self._left - (time.monotonic() - begun))
        return held


def share_of_processor(measure: Callable[[], object]) -> float:
    """Call ``measure``, and say for which share of the time this thread had a processor: 1 on a quiet machine, where it
    computes, or waits in a loop for the threads that compute with it. What was lost in less than a scheduler's slice
    is not counted."""
    begun, own = time.perf_counter(), time.thread_time()
    measure()
    own, whole = time.thread_time() - own, time.perf_counter() - begun
    return 1.0 if whole - own < _SLICE else max(0.0, own / whole)


def _file() -> Path:
    """One a machine: several may share the cache."""
    return open_cache_dir() / f"measuring-{platform.node().replace('/', '-')}.lock"
