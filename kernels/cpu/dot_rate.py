"""Whether the processor's bf16 dot products are fast, measured once.

``vdpbf16ps`` multiplies and adds two bf16 numbers a lane. Zen 5 runs it as often as a float32 multiply-add, so it does
twice the work; Sapphire Rapids takes 2.1 cycles for one where a float32 multiply-add takes .55, so numbers that are
widened to float32 as they are packed are multiplied twice as fast, and whole products come out 1.3 to 1.6 times as fast
(measured there at density .3). Which of the two a processor is like cannot be told by its flags.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import processor
from .folder import open_cache_dir
from .private import has_room
from .processes import run_all

# Multiply-adds by pairs may take this much longer than float32's: packed operands are half as large.
TOLERATED = 1.25
_SECONDS = 60.0  # that compiling a file of thirty lines may take
_FLAGS = "-std=c++17 -O2 -fPIC -shared -march=x86-64-v4 -mavx512bf16"
# Sixteen sums that do not wait for each other, in turn and several times over: the least time counts.
_PROGRAM = """\
#include <immintrin.h>
#include <algorithm>
#include <chrono>
template <class Vector, class Step> static double seconds(Vector x, Step step) {
  __m512 sums[16] = {};
  const auto start = std::chrono::steady_clock::now();
  for (int n = 0; n < 2000; n++) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) sums[i] = step(sums[i], x);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) asm volatile("" : "+v"(sums[i]));
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
  return took.count() / (2000 * 16);
}
extern "C" __attribute__((visibility("default"))) void dot_rate(double* dot, double* fma) {
  const __m512 one = _mm512_set1_ps(1.0f);
  *dot = *fma = 1;
  for (int round = 0; round < 15; round++) {
    *dot = std::min(*dot, seconds((__m512bh)one, [](__m512 s, __m512bh x) { return _mm512_dpbf16_ps(s, x, x); }));
    *fma = std::min(*fma, seconds(one, [](__m512 s, __m512 x) { return _mm512_fmadd_ps(x, x, s); }));
  }
}
"""


class DotRate(NamedTuple):
    """Seconds of one instruction on 16 lanes: a bf16 dot product (two multiply-adds a lane), a float32 multiply-add."""

    dot: float
    fma: float

    @property
    def pays(self) -> bool:
        """Whether bf16 numbers are better multiplied in pairs than widened."""
        return self.dot / 2 <= TOLERATED * self.fma


def dot_rate(compiler: Callable[[], tuple[str, ...]]) -> DotRate | None:
    """The measurement of this processor, kept on disk; None where it can be neither found nor made.

    Args:
        compiler: gives the command of a C++ compiler, asked only where nothing is kept. What it raises is not passed
            on: whoever needs a compiler will be told.
    """
    try:
        file = open_cache_dir() / f"dot_rate_{_key()}.json"
    except OSError:
        return _make(None, compiler)
    return _read(file) or _make(file, compiler)


@functools.cache
def _key() -> str:
    told = "\n".join([processor.processor_name(), _PROGRAM, _FLAGS])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def _read(file: Path) -> DotRate | None:
    try:
        rate = DotRate(**json.loads(file.read_text()))
        return rate if 0 < rate.dot < 1 and 0 < rate.fma < 1 else None
    except (OSError, ValueError, TypeError, RecursionError):
        return None


def _make(file: Path | None, compiler: Callable[[], tuple[str, ...]]) -> DotRate | None:
    """Measure, beside the file, or where there is room if there is none there; and keep it if it can be kept."""
    for place in (None if file is None else file.parent, None):
        try:
            with tempfile.TemporaryDirectory(prefix="rate-", dir=place, ignore_cleanup_errors=True) as work:
                rate = _measure(Path(work), compiler())
                if file is not None:
                    _keep(rate, Path(work) / "rate.json", file)
                return rate
        except OSError:
            continue
        except (RuntimeError, AttributeError):  # of compilers: RuntimeError
            if place is None or has_room(place):
                return None
    return None


def _keep(rate: DotRate, draft: Path, file: Path) -> None:
    with contextlib.suppress(OSError):
        draft.write_text(json.dumps(rate._asdict()))
        os.replace(draft, file)


def _measure(work: Path, compiler: tuple[str, ...]) -> DotRate:
    source, library = work / "rate.cc", work / "rate.so"
    source.write_text(_PROGRAM)
    run_all([[*compiler, *_FLAGS.split(), str(source), "-o", str(library)]], _SECONDS, work)
    dot, fma = ctypes.c_double(), ctypes.c_double()
    ctypes.CDLL(str(library)).dot_rate(ctypes.byref(dot), ctypes.byref(fma))
    return DotRate(dot.value, fma.value)
