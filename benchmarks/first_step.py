"""What a model costs before and beside its steps: the first training step, compilation included, and memory.

    python -m benchmarks.first_step --models gpt2,tiny

Each side in a process of its own, with caches that are empty: what the first step takes in processor time, which says
more than the clock on a machine that others use; of ours how much the rewriting of graphs and the measuring of products
take of it. Then the peak of resident memory over some more steps, of what compilation has left behind given back first.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .ledger import print_table, record
from .models import MODELS, build

STEPS = 3


def child(args: argparse.Namespace) -> None:
    """Take the first step and some more of one side, and print what they cost as JSON."""
    import mst_compile
    from mst_compile.graph.compiler import Compiler
    from mst_compile.graph.dispatch import Dispatch

    from .never_slower_models import set_density, trainer

    torch.set_num_threads(args.threads)
    case, spent = build(args.models), {"rewriting": 0.0, "measuring": 0.0}
    if args.side == "mst":
        mst_compile.sparsify(case.model, mst_compile.Constant(0.5, growth="none"))
        set_density(case.model, args.density)
        _time(Compiler, "__init__", spent, "rewriting")
        _time(Dispatch, "_measured", spent, "measuring")
    step = trainer(case, args.side, args.dtype)
    before, start = sum(os.times()[:4]), time.perf_counter()
    step()
    found = {"cpu": sum(os.times()[:4]) - before, "wall": time.perf_counter() - start, **spent}
    step()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(STEPS):
        step()
    lines = Path("/proc/self/status").read_text().splitlines()
    found["MiB"] = int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024
    print(json.dumps(found))


def _time(owner: Any, name: str, spent: dict[str, float], key: str) -> None:
    """Have the processor time in a method of ``owner`` added to ``spent[key]``."""
    original: Callable[..., Any] = getattr(owner, name)

    def timed(*args: Any, **options: Any) -> Any:
        start = time.process_time()
        try:
            return original(*args, **options)
        finally:
            spent[key] += time.process_time() - start

    setattr(owner, name, timed)


def measured(name: str, side: str, args: argparse.Namespace) -> dict[str, float]:
    """What :func:`child` prints, of a process with empty caches."""
    command = [sys.executable, "-m", "benchmarks.first_step", "--models", name, "--side", side]
    command += ["--dtype", args.dtype, "--density", str(args.density), "--threads", str(args.threads)]
    with tempfile.TemporaryDirectory() as folder:
        own = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "MST_COMPILE_TIMES": f"{folder}/times"}
        own["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # compilers are children then, whose time is known when they end
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | own).stdout
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--density", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry", action="store_true", help="print alone, write nothing to the ledger")
    parser.add_argument("--side", choices=("inductor", "mst"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.side:
        child(args)
        return
    rows = []
    for name in args.models.split(","):
        sides = {side: measured(name, side, args) for side in ("inductor", "mst")}
        dense, ours = sides["inductor"], sides["mst"]
        case = f"{name} d={args.density:g}"
        own = f"rewriting {ours['rewriting']:.1f} s, measuring {ours['measuring']:.1f} s"
        for side, found in sides.items() if not args.dry else ():
            note = "median_s: processor time of the first step; ratio: of dense" + (f"; {own}" if side == "mst" else "")
            record("first_step", case, side, found["cpu"], found["cpu"] / dense["cpu"], 1, args.dtype, note)
            more = f"{case} steps"
            record("memory", more, side, found["MiB"], found["MiB"] / dense["MiB"], 1, args.dtype,
                   "median_s: peak MiB of later steps; ratio: of dense")  # fmt: skip
        rows.append((case, f"{dense['cpu']:.1f}", f"{ours['cpu']:.1f}", f"{ours['cpu'] / dense['cpu']:.2f}", own,
                     f"{dense['MiB']:.0f}", f"{ours['MiB']:.0f}", f"{ours['MiB'] / dense['MiB']:.3f}"))  # fmt: skip
        print(*rows[-1], flush=True)
    print()
    print_table(("model", "dense s", "mst s", "ratio", "of it", "dense MiB", "mst MiB", "ratio"), rows)


if __name__ == "__main__":
    main()
