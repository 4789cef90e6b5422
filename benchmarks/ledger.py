"""The ledger of measurements, and interleaved timing.

Machines are shared and noisy: sides are timed in turn within one run, medians are compared, and a row names the
machine, the versions and the conditions.
"""

from __future__ import annotations

import csv
import datetime
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

import mst_compile

LEDGER = Path(__file__).parent / "ledger.csv"
FIELDS = (
    "date", "commit", "benchmark", "case", "side", "median_s", "ratio", "runs", "threads", "dtype", "cpu", "torch",
    "mst_compile", "note",
)  # fmt: skip


def cpu_name() -> str:
    """Model of the processor, with what decides our kernels' speed."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    name = next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")
    has = [isa for isa in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if isa in text]
    return f"{name or platform.processor() or platform.machine()} ({' '.join(has)})"


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
    benchmark: str, case: str, side: str, median_s: float, ratio: float, runs: int, dtype: str, note: str = ""
) -> None:
    """Append one row. ``ratio`` is the baseline's median over this side's (above 1: faster), or what ``note`` says."""
    row = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "benchmark": benchmark,
        "case": case,
        "side": side,
        "median_s": f"{median_s:.6f}",
        "ratio": f"{ratio:.3f}",
        "runs": runs,
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "cpu": cpu_name(),
        "torch": torch.__version__,
        "mst_compile": mst_compile.__version__,
        "note": note,
    }
    new = not LEDGER.exists()
    with LEDGER.open("a", newline="") as file:
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
