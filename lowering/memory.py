"""Let the process keep the memory that it frees, on Linux with glibc.

By default glibc gives every freed block of more than 32 MB back to the system, and the next training step pays page
faults to get it again: 16 to 22 ms for the 50 MB output of one layer that itself takes 6 ms at a density of 0.1. With
fewer FLOPs such fixed costs decide, so the backend turns this off once for the process. The same peak of memory is
used; it is held between the steps. ``options={"mst.keep_memory": False}`` leaves the allocator alone, and so does
setting any of glibc's ``MALLOC_*`` variables or another allocator.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform

# malloc.h
_M_TRIM_THRESHOLD = -1
_M_TOP_PAD = -2
_M_MMAP_MAX = -4
_TOP_PAD_BYTES = 64 << 20


@functools.cache
def keep_freed_memory() -> bool:
    """Keep freed memory in the process; returns whether the allocator was told so."""
    chosen = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if platform.libc_ver()[0] != "glibc" or chosen or os.environ.get("LD_PRELOAD"):
        return False
    libc = ctypes.CDLL(None)
    return all(
        libc.mallopt(parameter, value) == 1
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, _TOP_PAD_BYTES))
    )
