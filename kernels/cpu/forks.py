"""What a forked process lacks: of all threads it has the one that forked, while locks, and what OpenMP knows of its
threads, are as they were.

A product would then wait forever for threads that there are not, and so would any of PyTorch's: in the child, at the
first one that runs in parallel, without a word.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from types import TracebackType

_SOFT = 1  # omp_pause_soft


class Lock:
    """A re-entrant lock that is free in a forked child, whoever held it in the parent: none of them lives there."""

    def __init__(self) -> None:
        self._renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._renew)

    def _renew(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._lock.release()


def survive_forks(dll: ctypes.CDLL) -> None:
    """From now on, let OpenMP end the threads of whoever is about to fork, those of PyTorch's products included, which
    share them. Parent and child make new ones when they first need some, within a tenth of a millisecond.

    Args:
        dll: a library that was linked with the OpenMP runtime; of one that was not nothing is asked.
    """
    pause = getattr(dll, "omp_pause_resource_all", None)
    address = None if pause is None else ctypes.cast(pause, ctypes.c_void_p).value
    if address is not None and hasattr(os, "register_at_fork"):
        _pause_before_forks(address)


@functools.cache
def _pause_before_forks(address: int) -> None:
    """Once for each runtime: several libraries may be linked with one."""
    pause = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(address)
    os.register_at_fork(before=lambda: pause(_SOFT))
