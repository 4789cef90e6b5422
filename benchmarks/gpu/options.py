"""The command's options, and which cells they choose. No torch: the supervisor reads them too."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from . import plan
from .keep import FOLDER
from .plan import Cell, ModelCell

_MINUTES = {"all": 9.0, "speed": 6.0}
_PARTS = {"layer": "layers", "model": "models", "attention": "attention", "experts": "experts"}  # of each kind of cell
_RIVALS = (*plan.RIVALS, "flex")
_SMOKE_TOKENS, _SMOKE_SHAPES, _SMOKE_BLOCKS, _SMOKE_DENSITIES = (64,), ((128, 96),), (32,), (0.3, 1.0)
SMOKE_ATTENTIONS = (plan.AttentionCell("sparse", 70, 2, 32, 2, 16, 16),)
SMOKE_EXPERTS = (plan.ExpertsCell(90, 3, 128, 96, 32, (0.3, 1.0)),)
_SMOKE_MODELS = (ModelCell("tiny", 64, 1, 2, 128, 2, 32),)


def _numbers(kind: type) -> object:
    return lambda text: tuple(kind(part) for part in text.split(","))


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(n), int(k)) for n, k in (part.split("x") for part in text.split(",")))


def parser(description: str | None = None) -> argparse.ArgumentParser:
    """Options of the command."""
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("what", nargs="?", choices=tuple(_MINUTES), default="all", help="speed: what decides, first")
    p.add_argument("--minutes", type=float, help="no cell is begun that would not end within these; 9, speed: 6")
    p.add_argument("--part", choices=tuple(_PARTS.values()), help="one part alone")
    p.add_argument("--blocks", type=_numbers(int), help="block edges, 128,64,32")  # type: ignore[arg-type]
    p.add_argument("--densities", type=_numbers(float), help="1,.5,.3,.2,.1,.05")  # type: ignore[arg-type]
    p.add_argument("--tokens", type=_numbers(int), help="M of the layers")  # type: ignore[arg-type]
    p.add_argument("--shapes", type=_shapes, help="NxK of the layers, comma-separated")
    p.add_argument("--tune-each", action="store_true", help="compile for every density anew; takes much longer")
    p.add_argument("--tune", action="store_true", help="all cells with Inductor's max_autotune_gemm, dense sides too")
    p.add_argument("--model-block", type=int, default=64)
    p.add_argument("--runs", type=int, help="rounds of interleaved timing, 20 for layers and 10 for models")
    p.add_argument("--ledger", type=Path, help="another file than benchmarks/ledger.csv, speed: OUT/ledger.csv")
    p.add_argument("--out", type=Path, metavar="FOLDER", help=f"what the next run goes on from; speed: {FOLDER}")
    p.add_argument("--again", action="store_true", help="measure what stands in OUT too")
    p.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or with --smoke cpu")
    p.add_argument("--smoke", action="store_true", help="tiny sizes: tests the program, measures nothing of use")
    p.add_argument("--without", action="append", default=[], choices=_RIVALS, help="leave a rival out; speed: bsr")
    for hidden in ("--from", "--died", "--progress", "--end"):  # between the supervisor and its worker
        p.add_argument(hidden, dest=hidden.strip("-") + "_", help=argparse.SUPPRESS)
    return p


def parse(argv: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """The options, with those defaults that depend on what is to be done."""
    args = parser(description).parse_args(argv)
    if args.minutes is None:
        args.minutes = _MINUTES[args.what]
    if args.what == "speed":
        args.out = args.out or FOLDER
        args.ledger = args.ledger or args.out / "ledger.csv"
        args.without.append("bsr")
    return args


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """All cells that the options choose, the most important first."""
    if args.what == "speed" and not args.smoke:
        cells = plan.speed_cells()
    else:
        cells = _all(args)
    if args.tune:
        cells = [plan.tuned(cell) for cell in cells if not cell.tune]
    return [cell for cell in cells if args.part is None or args.part == _PARTS[cell.kind]]


def _all(args: argparse.Namespace) -> list[Cell]:
    smoke = args.smoke
    some_layers = plan.layer_cells(
        args.tokens or (_SMOKE_TOKENS if smoke else plan.TOKENS),
        args.shapes or (_SMOKE_SHAPES if smoke else plan.SHAPES),
        args.blocks or (_SMOKE_BLOCKS if smoke else plan.BLOCKS),
        args.densities or (_SMOKE_DENSITIES if smoke else plan.DENSITIES),
        args.tune_each,
    )
    some_models = _SMOKE_MODELS if smoke else plan.MODELS
    some_experts = SMOKE_EXPERTS if smoke else plan.EXPERTS
    return plan.order(some_layers, some_models, SMOKE_ATTENTIONS if smoke else plan.ATTENTIONS, some_experts)
