"""How many threads products of the calling thread run on, while something is measured.

``torch.set_num_threads`` is of the whole process: a thread that first computes meanwhile would keep the number for as
long as it lives, and products of others would choose their kernels by it. What it sets, OpenMP and MKL also have for
one thread alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Let products of this thread run on one, and leave those of others alone as far as the libraries allow it."""
    threads = torch.get_num_threads()
    own = _of_this_thread()
    if own is None:
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
        return
    openmp, mkl = own
    of_mkl = mkl(1)
    openmp(1)
    try:
        yield
    finally:
        openmp(threads)
        mkl(of_mkl)


@functools.cache
def _of_this_thread() -> tuple[Callable[[int], object], Callable[[int], int]] | None:
    """OpenMP's setter and MKL's, which returns what was set before (0: nothing); None where they are not known."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        openmp = library.omp_set_num_threads  # of the runtime that PyTorch was linked with
        mkl = library.MKL_Set_Num_Threads_Local if torch.backends.mkl.is_available() else lambda _: 0
    except (OSError, AttributeError):
        return None
    return openmp, mkl
