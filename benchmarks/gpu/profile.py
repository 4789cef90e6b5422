"""Nsight Compute's account of the kernels that missed their goal.

    python -m benchmarks.gpu profile                       # what OUT/ledger.csv says of `speed`, within 3 minutes
    python -m benchmarks.gpu profile --case "M=16384 N=4096 K=4096 B=32 d=0.100 sum"

Each case is compiled and run in a process of its own; then each kernel of one call more of every product (of forward
and backward for attention) is profiled, and OUT/ncu-CASE.txt holds the details. Where there is no ncu, it says so.
"""

from __future__ import annotations

import argparse
import csv
import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from . import options, plan
from .checkout import ROOT
from .keep import FOLDER
from .plan import AttentionCell, Cell, LayerCell

_PLACES = ("/usr/local/cuda*/bin/ncu", "/opt/nvidia/nsight-compute/*/ncu")
_LAYER = re.compile(r"M=(\d+) N=(\d+) K=(\d+) B=(\d+)(?: for=([\d.]+))?( max-autotune)? d=([\d.]+)")


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu profile", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    p.add_argument("--case", action="append", help="a case of the ledger, instead of those that missed their goal")
    p.add_argument("--minutes", type=float, default=3.0, help="all is ended after these")
    p.add_argument("--out", type=Path, default=FOLDER, metavar="FOLDER", help=f"default {FOLDER}")
    p.add_argument("--set", default="full", help="ncu's set of metrics")
    p.add_argument("--device", default="cuda")
    p.add_argument("--launch", action="store_true", help=argparse.SUPPRESS)  # the process that is profiled
    return p


def missed(ledger: Path) -> list[str]:
    """Cases whose newest row missed its goal, in the ledger's order."""
    if not ledger.exists():
        return []
    with ledger.open(newline="") as file:
        newest = {row["case"]: row["note"] for row in csv.DictReader(file) if row["side"] == "mst"}
    return [case for case, note in newest.items() if " missed" in note]


def cell_of(case: str) -> Cell | None:
    """The cell of a case in the ledger, a layer with that density alone; None for whole models and what is unknown."""
    layer = _LAYER.match(case)
    if layer is not None:
        m, n, k, block = map(int, layer.groups()[:4])
        density = float(layer[7])
        return LayerCell(m, n, k, block, (density,), float(layer[5] or plan.TUNED_FOR), layer[6] is not None)
    known = (*plan.speed_cells(), *options.SMOKE_ATTENTIONS)
    attentions = (cell for cell in known if isinstance(cell, AttentionCell))
    return next((c for c in attentions if case in (f"{c.case} forward", f"{c.case} forward and backward")), None)


def find_ncu() -> str | None:
    """The profiler, on the path or where CUDA's installers put it."""
    return shutil.which("ncu") or next((path for pattern in _PLACES for path in sorted(glob.glob(pattern))[-1:]), None)


def _calls(cell: Cell, device: str) -> dict[str, Callable[[], object]]:
    """What is profiled, compiled at the first call."""
    import torch

    from . import attention, layers

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if isinstance(cell, LayerCell):
        layer = layers.Layer(cell, torch.device(device), dtype)
        layer.set_density(cell.densities[0])
        return dict(layers.ours(layer, cell.tuned_for))
    assert isinstance(cell, AttentionCell)
    q, k, v, grad = attention.operands(cell, torch.device(device), dtype)
    leaves, attend = [t.requires_grad_() for t in (q, k, v)], attention.ours(cell)
    return {"forward and backward": lambda: torch.autograd.grad(attend(*leaves), leaves, grad)}


def launch(cell: Cell, device: str) -> None:
    """Compile and run everything, then once more between the marks that ncu waits for."""
    import torch
    from torch._inductor import config

    on_gpu = device.startswith("cuda")
    with torch.set_grad_enabled(isinstance(cell, AttentionCell)), config.patch({"max_autotune_gemm": cell.tune}):
        calls = _calls(cell, device)
        for _ in range(3):
            for call in calls.values():
                call()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        for name, call in calls.items():
            call()
            print(f"profiled: {name}", flush=True)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


def _profile(ncu: str, case: str, report: Path, args: argparse.Namespace, seconds: float) -> bool:
    """Run one case under ncu; whether that came to its end."""
    command = [
        ncu, "--set", args.set, "--profile-from-start", "off", "--target-processes", "all", "--clock-control", "none",
        "--page", "details", "--log-file", str(report.resolve()),
        sys.executable, "-m", "benchmarks.gpu", "profile", "--launch", "--case", case, "--device", args.device,
    ]  # fmt: skip
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # no compiling processes under the profiler
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        print(f"time was over: {case}", flush=True)
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    print(f"{case}: {report}" if status == 0 else f"FAILED {case}: ncu ended with status {status}, see {report}")
    return status == 0


def main(argv: Sequence[str]) -> int:
    """Run the command; exit status 0, 1 if a case could not be profiled, 2 for a case that is unknown."""
    args = parser().parse_args(argv)
    cases = args.case or missed(args.out / "ledger.csv")
    cells = {case: cell_of(case) for case in cases}
    if args.launch:
        (cell,) = cells.values()
        assert cell is not None
        launch(cell, args.device)
        return 0
    ncu = find_ncu()
    if ncu is None:
        print("benchmarks.gpu profile: there is no ncu (NVIDIA Nsight Compute) here, nothing is profiled")
        return 0
    if not cases:
        print(f"benchmarks.gpu profile: nothing in {args.out / 'ledger.csv'} missed a goal; --case names another")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    end, good = time.monotonic() + 60 * args.minutes, True
    for case, cell in cells.items():
        if cell is None:
            print(f"not profiled, neither a layer nor an attention of the benchmark: {case}")
            if args.case:
                return 2
            continue
        report = args.out / f"ncu-{re.sub(r'[^A-Za-z0-9.]+', '-', case)}.txt"
        good = _profile(ncu, case, report, args, max(0.0, end - time.monotonic())) and good
    return 0 if good else 1
