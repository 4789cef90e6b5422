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

from ..ledger import device_name
from . import attention, experts, layers, models, rivals
from .keep import Lines, fingerprint
from .options import cells_of, parse
from .plan import AttentionCell, Budget, Cell, ExpertsCell, LayerCell
from .report import Run
from .supervisor import BROKEN
from .tuning import Keeper

# Seconds that a cell may take before one has been seen; a fresh process compiles for a good part of a minute.
_GUESSES = {"layer": 25.0, "model": 75.0, "attention": 30.0, "experts": 40.0}
_TUNING = 15.0  # beyond those


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


class Finished:
    """The cells that are measured, or failed for good, with this code on this card: they are not begun again."""

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self._lines = None if args.out is None else Lines(args.out / "cells.jsonl")
        self._on = {"code": fingerprint(), "on": f"{device_name(device)}, torch {torch.__version__}"}
        known = [] if self._lines is None or args.again else self._lines.read()
        self._cells = {line["cell"] for line in known if self._on.items() <= line.items()}

    def __contains__(self, cell: Cell) -> bool:
        return _key(cell) in self._cells

    def add(self, cell: Cell, result: str, keeper: Keeper) -> None:
        if self._lines is not None:
            self._lines.add({"cell": _key(cell), **self._on, "result": result, "tiles": keeper.winners})


def _key(cell: Cell) -> str:
    return f"{cell.case} at {cell.densities}" if isinstance(cell, LayerCell | ExpertsCell) else cell.case


def _kind(cell: Cell) -> str:
    """Cells of a kind take about as long."""
    return cell.kind + " tuned" * cell.tune


def _run_cell(cell: Cell, run: Run, args: argparse.Namespace, keeper: Keeper) -> None:
    torch._dynamo.reset()
    run.stage("mst")
    # On a CPU nothing is tuned, and an empty cache would only cost the time to compile.
    cache = keeper.cell(_key(cell)) if run.device.type == "cuda" else contextlib.nullcontext()
    with cache, inductor_config.patch({"max_autotune_gemm": True} if cell.tune else {}):
        if isinstance(cell, LayerCell):
            layers.measure(cell, run)
        elif isinstance(cell, AttentionCell):
            attention.measure(cell, run)
        elif isinstance(cell, ExpertsCell):
            experts.measure(cell, run)
        else:
            models.measure(cell, run, args.model_block)


def _benchmark(cell: Cell) -> str:
    if isinstance(cell, AttentionCell):
        return attention.BENCHMARK
    if isinstance(cell, ExpertsCell):
        return experts.BENCHMARK
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


def _loop(cells: Sequence[Cell], run: Run, args: argparse.Namespace, finished: Finished, keeper: Keeper) -> int:
    """Exit status: 0, 1 if a cell failed, ``BROKEN`` if a new process must go on after the failed cell."""
    for index in range(int(args.from_ or 0), len(cells)):
        cell = cells[index]
        if cell in finished:
            print(f"measured before: {cell.case}", flush=True)
            continue
        if not run.budget.allows(_kind(cell)):
            run.skipped(cell.case)
            continue
        print(f"-- {cell.case}", flush=True)
        start, failures = time.monotonic(), len(run.failures)
        run.index, run.cut, run.runs = (
            index,
            False,
            args.runs or (20 if isinstance(cell, LayerCell | ExpertsCell) else 10),
        )
        try:
            _run_cell(cell, run, args, keeper)
        except Exception as error:
            run.failed(_benchmark(cell), cell.case, "mst", f"{type(error).__name__}: {error}")
            failed = True
        else:
            failed = False
        if not run.cut:
            finished.add(cell, "failed" if len(run.failures) > failures else "measured", keeper)
        if _broken(run):
            run.print_summary()
            return BROKEN
        if not failed:  # a failure's time tells nothing of the others'
            run.budget.spent(_kind(cell), time.monotonic() - start)
    run.print_summary()
    return 1 if run.failures else 0


def run(argv: Sequence[str] | None = None) -> int:
    """Measure within this process; the exit status of :func:`_loop`, 2 if nothing can be measured here."""
    args = parse(argv)
    reason = _why_not(args)
    if reason is not None:
        print(f"benchmarks.gpu: {reason}")
        return 2
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    guesses = _GUESSES | {f"{kind} tuned": seconds + _TUNING for kind, seconds in _GUESSES.items()}
    minutes = args.minutes if args.end_ is None else (float(args.end_) - time.monotonic()) / 60
    budget = Budget(minutes, {} if args.smoke else guesses)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    this = Run(device, dtype, budget, 0, args.ledger, Path(args.progress_) if args.progress_ else None)
    this.without = set(args.without)
    if args.ledger is not None:
        args.ledger.parent.mkdir(parents=True, exist_ok=True)
    cells, finished = cells_of(args), Finished(args, device)
    keeper = Keeper(None if args.out is None else args.out / "tuning.json")
    if args.died_:
        died = cells[int(args.from_) - 1]
        this.failed(_benchmark(died), died.case, *args.died_.split(":", 1))
        finished.add(died, "failed", keeper)
    print(f"{device_name(device)}, torch {torch.__version__}, {this.dtype_name}, {minutes:.1f} minutes")
    for name in rivals.RIVALS:
        absent = rivals.why_absent(name, device)
        if absent is not None:
            print(f"without {name}: {absent}")
    return _loop(cells, this, args, finished, keeper)
