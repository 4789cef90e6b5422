"""``python -m mst_compile try --data FILE``."""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from mst_compile.errors import ArgumentError, MissingPackageError, MSTError, MSTWarning
from mst_compile.kernels import cpu as kernels
from mst_compile.report import command as report
from mst_compile.report.history import overview
from mst_compile.report.sinks import need

from . import place, text
from .model import Shape
from .training import TIMED, UNKNOWN, Run, Setup, schedule_of

_ABOUT = """Train a small byte-level GPT on your own text, dense and with Mixed Sparsity Training, within a few minutes
on a CPU; write a sample of what it has learnt, and a report."""
_AT_LEAST = 60  # steps that are worth a comparison
_FEWEST = 30  # that the sparse model trains, however slow the machine is
_SPARSE = 0.8  # of a dense step, what a sparse one is taken to cost before it was measured
_COMPILES = 0.6  # times as long as the dense model the sparse one compiles, both variants: what all share is there
_KERNELS = 25.0  # seconds that building and timing kernels takes the first time
_SEEDS = 2**32
_REPORT = 12.0  # seconds for what comes at the end


def parser() -> argparse.ArgumentParser:
    """Options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m mst_compile try", description=_ABOUT, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    p.add_argument("--data", type=_path, nargs="+", required=True, metavar="FILE", help="text files")
    p.add_argument("--out", type=_path, default=Path("runs/try"), help="folder; an earlier try in it is replaced")
    p.add_argument("--minutes", type=float, default=4.0, help="about how long it may take, compilation included")
    p.add_argument("--steps", type=int, default=0, help="optimizer steps of each run; 0: as many as the time allows")
    p.add_argument("--no-dense", dest="dense", action="store_false", help="train the sparse model alone")
    p.add_argument("--width", type=int, default=256, help="of the model, a multiple of 64")
    p.add_argument("--layers", type=int, default=2)
    p.add_argument("--context", type=int, default=128, help="bytes that the model sees")
    p.add_argument("--batch", type=int, default=8, help="windows of text a step")
    p.add_argument("--prompt", default="", help="what the sample begins with; default a line of the text")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--no-compile", dest="compile", action="store_false", help="run eagerly; nothing gets faster")
    return p


def _path(text: str) -> Path:
    """A path that was given; an empty one, as of a variable that is not set, would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("a path is empty")
    return Path(text)


def main(argv: Sequence[str]) -> int:
    """Run the command; exit status 2 if something is wrong with what it was given."""
    args = parser().parse_args(argv)
    try:
        _try(args)
    except MSTError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def _try(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    setup = _setup(args)
    with place.held(args.out), contextlib.ExitStack() as quiet:
        if not args.compile:  # which is what was asked for
            quiet.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "no graph compiled by", MSTWarning)
        _run(args, setup, started)


def _run(args: argparse.Namespace, setup: Setup, started: float) -> None:
    bytes_of = f"{len(setup.train) / 1e6:.2f} MB to train on, {len(setup.validation) / 1e3:.1f} kB held out"
    shape = setup.shape
    print(f"text: {bytes_of}; model: {shape.layers} layers of width {shape.width}, {shape.context} bytes of context")
    dense, steps = _begin(args, setup, started)
    if dense is not None:
        dense.train(steps)
        dense.finish(_prompt(args, setup), 0)
    sparse = Run("sparse", setup, steps, args.out / "sparse", schedule_of(steps))
    sparse.train(steps)
    written = sparse.finish(_prompt(args, setup), 300)
    folders = [args.out / name for name, run in (("sparse", sparse), ("dense", dense)) if run is not None]
    histories = [overview(folder) for folder in folders]
    page = args.out / "report.html"
    report.write(folders, page)
    print("\nthe sparse model, dense again at the end, writes:\n\n    " + written.replace("\n", "\n    "))
    print()
    from mst_compile.report.page import savings  # matplotlib, which takes a second

    for line in savings(histories):
        print(line)
    print(f"\nreport: {page}\nweights: {args.out / 'sparse' / 'model.pt'}")
    print(f"all in all {time.perf_counter() - started:.0f} s")


def _setup(args: argparse.Namespace) -> Setup:
    """Check all that can be wrong before anything takes time."""
    need("matplotlib", "the report's figures", '"mst-compile[viz]"')
    args.out = args.out.expanduser()
    args.data = [file.expanduser() for file in args.data]
    for name in ("width", "layers", "context", "batch"):
        if getattr(args, name) < 1:
            raise ArgumentError(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.width % 64:
        raise ArgumentError(f"--width must be a multiple of 64, which is the size of a head, got {args.width}")
    if args.steps < 0 or 0 < args.steps < 10:
        raise ArgumentError(f"--steps must be at least 10, or 0 for as many as the time allows, got {args.steps}")
    if not (args.minutes > 0 and math.isfinite(args.minutes)):
        raise ArgumentError(f"--minutes must be positive, and no more than one has, got {args.minutes}")
    if not 0 <= args.seed < _SEEDS:
        raise ArgumentError(f"--seed must be at least 0 and less than {_SEEDS}, got {args.seed}")
    place.check(args.out)
    why = kernels.why_inductor_has_no_compiler() if args.compile else None
    if why is not None:
        raise MissingPackageError(f"{why}; --no-compile trains without one, and nothing gets faster")
    train, validation = text.load(args.data, args.context, args.seed)
    shape = Shape(args.width, args.layers, args.width // 64, args.context)
    return Setup(shape, args.batch, train, validation, seed=args.seed, compile=args.compile)


def _begin(args: argparse.Namespace, setup: Setup, started: float) -> tuple[Run | None, int]:
    """The dense run, if there will be one, and the number of steps.

    How long steps take, and so how many there is time for, is told by the first ones of the dense model: a schedule
    must know its end before the sparse model is made.
    """
    if args.steps and not args.dense:
        return None, args.steps
    dense = Run("dense", setup, args.steps or UNKNOWN, args.out / "dense", None)
    if args.steps:
        return dense, args.steps
    dense.train(1)
    compiling = dense.times[0]
    dense.train(1 + TIMED)
    step = dense.seconds_per_step()
    left = 60 * args.minutes - (time.perf_counter() - started)
    left -= _REPORT + (_COMPILES * compiling + _KERNELS if args.compile else 0.0)
    both, alone = int(left / (step * (1 + _SPARSE))), int(left / (step * _SPARSE))
    if args.dense and both >= _AT_LEAST:
        dense.steps = both
        print(f"a dense step takes {step:.2f} s: time for {both} steps dense and as many sparse", flush=True)
        return dense, both
    steps = max(alone, _FEWEST)
    dense.abandon()
    why = "time allows no dense run of as many" if args.dense else "no dense run was asked for"
    print(f"a dense step takes {step:.2f} s: {steps} steps sparse; {why}", flush=True)
    return None, steps


def _prompt(args: argparse.Namespace, setup: Setup) -> str:
    """What was asked for, or the first line of the held-out text that has some words."""
    if args.prompt:
        return args.prompt
    lines = bytes(setup.validation[:4096].tolist()).decode("utf-8", errors="replace").splitlines()
    return next((" ".join(line.split()[:4]) for line in lines if len(line.split()) > 3), "")
