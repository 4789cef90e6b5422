"""The loop over cells: each guarded, within the time budget."""

from __future__ import annotations

import argparse
import contextlib
import gc
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._inductor import config as inductor_config
from torch._inductor import utils as inductor_utils

from ..ledger import device_name
from . import attention, layers, models, rivals
from .options import cells_of, parser
from .plan import AttentionCell, Budget, Cell, LayerCell
from .report import Run
from .supervisor import BROKEN

# Seconds that a cell may take before one has been seen; a fresh process compiles for a good part of a minute.
_GUESSES = {"layer": 25.0, "model": 75.0, "attention": 30.0}


def _why_not(args: argparse.Namespace) -> str | None:
    """Why nothing can be measured here, or None."""
    if torch.device(args.device).type == "cpu":
        return None if args.smoke else "--device cpu is for --smoke: it tests the program and measures nothing of use"
    if not torch.cuda.is_available():
        return "no CUDA GPU here (torch.cuda.is_available() is false); --device cpu --smoke tests the program without"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    return None


def _cell_cache(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """No cell may see what another, or an older run, was tuned for: times of choices are cached by shape alone."""
    if device.type != "cuda":
        return contextlib.nullcontext()
    return inductor_utils.fresh_cache()


def _run_cell(cell: Cell, run: Run, args: argparse.Namespace) -> None:
    torch._dynamo.reset()
    run.stage("mst")
    # Else Inductor keeps them to itself. A whole model would tune every dense product too, 16 s each on an H100.
    tables = {"max_autotune_gemm": True} if run.show_tuning and isinstance(cell, LayerCell) else {}
    with _cell_cache(run.device), inductor_config.patch(tables):
        if isinstance(cell, LayerCell):
            layers.measure(cell, run)
        elif isinstance(cell, AttentionCell):
            attention.measure(cell, run)
        else:
            models.measure(cell, run, args.model_block)


def _benchmark(cell: Cell) -> str:
    if isinstance(cell, AttentionCell):
        return attention.BENCHMARK
    return layers.BENCHMARK if isinstance(cell, LayerCell) else models.BENCHMARK


def _broken(run: Run) -> bool:
    """Free what a failed cell held; True if the GPU's context is lost, so that only a new process can go on."""
    gc.collect()
    torch._dynamo.reset()
    if not run.usable():
        return True
    if run.device.type == "cuda":
        torch.cuda.empty_cache()
    return False


def _loop(cells: Sequence[Cell], run: Run, args: argparse.Namespace) -> int:
    """Exit status: 0, 1 if a cell failed, ``BROKEN`` if a new process must go on after the failed cell."""
    for index in range(int(args.from_ or 0), len(cells)):
        cell = cells[index]
        if not run.budget.allows(cell.kind):
            run.skipped(cell.case)
            continue
        print(f"-- {cell.case}", flush=True)
        start = time.monotonic()
        run.index, run.runs = index, args.runs or (20 if isinstance(cell, LayerCell) else 10)
        try:
            _run_cell(cell, run, args)
        except Exception as error:
            run.failed(_benchmark(cell), cell.case, "mst", f"{type(error).__name__}: {error}")
            failed = True
        else:
            failed = False
        if _broken(run):
            run.print_summary()
            return BROKEN
        if not failed:  # a failure's time tells nothing of the others'
            run.budget.spent(cell.kind, time.monotonic() - start)
    run.print_summary()
    return 1 if run.failures else 0


def run(argv: Sequence[str] | None = None) -> int:
    """Measure within this process; the exit status of :func:`_loop`, 2 if nothing can be measured here."""
    args = parser().parse_args(argv)
    reason = _why_not(args)
    if reason is not None:
        print(f"benchmarks.gpu: {reason}")
        return 2
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    budget = Budget(args.minutes, {} if args.smoke else _GUESSES)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    this = Run(device, dtype, budget, 0, args.ledger, Path(args.progress_) if args.progress_ else None)
    this.without, this.show_tuning = set(args.without), args.show_tuning
    cells = cells_of(args)
    if args.died_:
        this.failed(_benchmark(cells[int(args.from_) - 1]), cells[int(args.from_) - 1].case, *args.died_.split(":", 1))
    print(f"{device_name(device)}, torch {torch.__version__}, {this.dtype_name}, {args.minutes:g} minutes")
    for name in rivals.RIVALS:
        absent = rivals.why_absent(name, device)
        if absent is not None:
            print(f"without {name}: {absent}")
    return _loop(cells, this, args)
