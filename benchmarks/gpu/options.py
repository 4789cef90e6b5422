"""The command's options, and which cells they choose. No torch: the supervisor reads them too."""

from __future__ import annotations

import argparse
from pathlib import Path

from . import plan
from .plan import Cell, ModelCell

_SMOKE_TOKENS, _SMOKE_SHAPES, _SMOKE_BLOCKS, _SMOKE_DENSITIES = (64,), ((128, 96),), (32,), (0.3, 1.0)
_SMOKE_ATTENTIONS = (plan.AttentionCell("sparse", 70, 2, 32, 2, 16, 16),)
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
    p.add_argument("--minutes", type=float, default=9.0, help="no cell is begun that would not end within these")
    p.add_argument("--part", choices=("layers", "models", "attention"), help="one part alone")
    p.add_argument("--blocks", type=_numbers(int), help="block edges, 128,64,32")  # type: ignore[arg-type]
    p.add_argument("--densities", type=_numbers(float), help="1,.5,.3,.2,.1,.05")  # type: ignore[arg-type]
    p.add_argument("--tokens", type=_numbers(int), help="M of the layers")  # type: ignore[arg-type]
    p.add_argument("--shapes", type=_shapes, help="NxK of the layers, comma-separated")
    p.add_argument("--tune-each", action="store_true", help="compile for every density anew; takes much longer")
    p.add_argument("--show-tuning", action="store_true", help="print what each choice of the autotuner takes")
    p.add_argument("--model-block", type=int, default=64)
    p.add_argument("--runs", type=int, help="rounds of interleaved timing, 20 for layers and 10 for models")
    p.add_argument("--ledger", type=Path, help="another file than benchmarks/ledger.csv")
    p.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or with --smoke cpu")
    p.add_argument("--smoke", action="store_true", help="tiny sizes: tests the program, measures nothing of use")
    p.add_argument("--without", action="append", default=[], choices=(*plan.RIVALS, "flex"), help="leave a rival out")
    for hidden in ("--from", "--died", "--progress"):  # between the supervisor and its worker
        p.add_argument(hidden, dest=hidden.strip("-") + "_", help=argparse.SUPPRESS)
    return p


def cells_of(args: argparse.Namespace) -> list[Cell]:
    """All cells that the options choose, the most important first."""
    smoke = args.smoke
    some_layers = plan.layer_cells(
        args.tokens or (_SMOKE_TOKENS if smoke else plan.TOKENS),
        args.shapes or (_SMOKE_SHAPES if smoke else plan.SHAPES),
        args.blocks or (_SMOKE_BLOCKS if smoke else plan.BLOCKS),
        args.densities or (_SMOKE_DENSITIES if smoke else plan.DENSITIES),
        args.tune_each,
    )
    some_models = _SMOKE_MODELS if smoke else plan.MODELS
    attentions = _SMOKE_ATTENTIONS if smoke else plan.ATTENTIONS
    return plan.order(
        some_layers if args.part in (None, "layers") else (),
        some_models if args.part in (None, "models") else (),
        attentions if args.part in (None, "attention") else (),
    )
