"""The ledger of measurements, and interleaved timing.

Machines are shared and noisy: sides are timed in turn within one run, medians are compared, and a row names the
machine, the versions and the conditions.
"""

from __future__ import annotations

import csv
import datetime
import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import mst_compile
from mst_compile.report.machine import processor_name

LEDGER = Path(__file__).parent / "ledger.csv"
FIELDS = (
    "date", "commit", "benchmark", "case", "side", "median_s", "ratio", "runs", "threads", "dtype", "cpu", "torch",
    "mst_compile", "note",
)  # fmt: skip


def cpu_name() -> str:
    """Name of the processor, with what decides our kernels' speed."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    has = [isa for isa in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if isa in text]
    return f"{processor_name()} ({' '.join(has)})"


@functools.cache
def device_name(device: torch.device) -> str:
    """What a row names as its processor: the GPU, with driver, CUDA version and what bounds its clocks, or the CPU."""
    if device.type != "cuda":
        return cpu_name()
    properties = torch.cuda.get_device_properties(device)
    facts = [f"cc {properties.major}.{properties.minor}", f"{properties.multi_processor_count} SMs"]
    facts += [f"{properties.total_memory / 2**30:.0f} GiB", f"CUDA {torch.version.cuda}", *_smi(properties)]
    return f"{properties.name} ({' '.join(facts)})"


def _smi(properties: Any) -> list[str]:
    """Driver version and limits of clock and power as the driver's own tool tells them; nothing without it."""
    fields = {"driver_version": "driver", "clocks.max.sm": "SM at most", "power.limit": "power limit"}
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    if hasattr(properties, "uuid"):  # torch may number the GPUs otherwise than the driver does
        command += ["-i", f"GPU-{properties.uuid}"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    values = out.strip().splitlines()[0].split(", ") if out.strip() else []
    return [f"{label} {value}" for label, value in zip(fields.values(), values, strict=False)]


@functools.cache
def commit() -> str:
    """Short hash of the checked-out commit, with a plus if the tree differs from it."""
    folder = Path(__file__).parent
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        )
        dirty = subprocess.run(
            ["git", "status", "--porcelain", "--", "../mst_compile", "../lowering", "../kernels"],
            cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def record(
    benchmark: str,
    case: str,
    side: str,
    median_s: float,
    ratio: float,
    runs: int,
    dtype: str,
    note: str = "",
    *,
    device: torch.device | None = None,
    path: Path | None = None,
) -> None:
    """Append one row. ``ratio`` is the baseline's median over this side's (above 1: faster), or what ``note`` says.

    Args:
        device: what it ran on, a CPU if not given; its name stands in the column ``cpu``.
        path: another file than ``LEDGER``.
    """
    path = path or LEDGER
    row = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "benchmark": benchmark,
        "case": case,
        "side": side,
        "median_s": f"{median_s:.{6 if median_s >= 0.01 else 9}f}",  # a product takes microseconds on a GPU
        "ratio": f"{ratio:.3f}",
        "runs": runs,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "cpu": cpu_name() if device is None else device_name(device),
        "torch": torch.__version__,
        "mst_compile": mst_compile.__version__,
        "note": note,
    }
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def interleave(sides: dict[str, Callable[[], object]], runs: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of each call, the sides taken in turn so that noise hits all alike."""
    for side in sides.values():
        for _ in range(warmup):
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in seconds.items()}


def print_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Columns padded to their widest cell."""
    table = [[str(c) for c in line] for line in [head, *rows]]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
