"""Interleaved timing on a device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Call = Callable[[], object]

_FLUSH_BYTES = 256 << 20  # beyond the second-level cache of any GPU
_HEAD_START = 1_000_000  # clock cycles, about half a millisecond
_WARMUP = 3


def median_times(calls: dict[str, Call], device: torch.device, runs: int) -> dict[str, float]:
    """Median seconds of each call over ``runs`` rounds, all calls in turn within a round."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    measure = _cuda_round if device.type == "cuda" else _cpu_round
    for i in range(runs + _WARMUP):
        for name, seconds in measure(calls, device).items():
            if i >= _WARMUP:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def _cuda_round(calls: dict[str, Call], device: torch.device) -> dict[str, float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    events = {}
    for name, call in calls.items():
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        # The GPU waits while Python launches: else short kernels would be charged with the time of the launch.
        torch.cuda._sleep(_HEAD_START)
        start.record()
        call()
        end.record()
        events[name] = start, end
    torch.cuda.synchronize(device)
    return {name: start.elapsed_time(end) * 1e-3 for name, (start, end) in events.items()}


def _cpu_round(calls: dict[str, Call], device: torch.device) -> dict[str, float]:
    seconds = {}
    for name, call in calls.items():
        start = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - start
    return seconds
