"""Attention over the parts of a causal pattern, forward and backward, one online-softmax loop nest for all of them.

Forward::

    for each batch and head, each tile of BLOCK_M queries, the last ones first as they see most:      (one program)
        for each of the parts (mst_compile.rules.patterns.Parts):
            a run: tiles of BLOCK_N keys that every query sees; tiles that only some see, masked
            summaries: tiles of summary keys, gathered from the ends of the chunks before
            distances: one key a query at each distance, a row-wise dot of two [BLOCK_M, size] tiles
            update maxima, denominators and the weighted sum of values

The backward pass recomputes the probabilities: one kernel walks the keys of a query tile for grad-query, another the
queries of a key tile, and the heads of its group, for grad-key and grad-value. Nothing is added by atomics. The latter
takes one part a launch, as a key may be a summary and in a run, and the lowering adds their shares; the former takes
distances in a launch of their own, as row-wise dots want small tiles.

Arithmetic intensity: a key tile costs ``4 BLOCK_M BLOCK_N size`` operations for ``2 BLOCK_N size`` elements, so it is
bound by the tensor core; a row-wise dot costs 4 operations for the same elements as 2, and is bound by L2. A tile of
keys at distances would cost BLOCK_N times the operations of its row-wise dot.

The sources are ``templates/attention_*.py.jinja``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

from mst_compile.rules.patterns import Parts

from . import load

_FAR = 2**30  # further than any two positions, which are int32 here


@dataclass(frozen=True)
class AttentionTile:
    """``queries`` by ``keys``."""

    queries: int
    keys: int
    warps: int
    stages: int


def constants(parts: Parts) -> dict[str, int]:
    """The parts as constants of the templates: their numbers, and whether the window holds all keys."""
    numbers = {name.upper(): min(number, _FAR) for name, number in vars(parts).items()}
    return numbers | {"UNBOUNDED": parts.window >= _FAR}


def tiles(size: int, kind: str, which: str, parts: Parts) -> list[AttentionTile]:
    """Tiles to choose from for a head size, ``kind`` ("half", "tf32" or "ieee", see tiles.py), kernel ("forward",
    "grad_query" or "grad_key_value") and its parts."""
    column = 0 if size <= 64 else 1 if size <= 128 else 2
    rows_alone = which != "forward" and parts.step and len(parts.alone()) == 1
    return [AttentionTile(*tile) for tile in _TILES["rows" if rows_alone else which, kind][column]]


# Columns: head sizes up to 64, 128 and 256. Every one is cross-compiled for sm_90 by the test suite and must not spill
# more than one register.
_TILES: dict[tuple[str, str], list[list[tuple[int, int, int, int]]]] = {
    ("forward", "half"): [[(64, 64, 4, 3), (128, 64, 8, 3)], [(64, 64, 8, 2), (64, 32, 4, 2)], [(32, 32, 8, 2)]],
    ("grad_query", "half"): [[(64, 64, 4, 3), (128, 64, 8, 3)], [(64, 64, 8, 2), (128, 64, 8, 2)], [(64, 32, 8, 2)]],
    ("grad_key_value", "half"): [[(32, 128, 8, 2), (32, 64, 4, 2)], [(32, 64, 8, 2), (16, 64, 8, 2)], [(32, 32, 8, 1)]],
    ("rows", "half"): [[(64, 64, 4, 2)], [(32, 32, 4, 2)], [(16, 16, 4, 2)]],
    ("forward", "tf32"): [[(64, 32, 4, 2)], [(64, 32, 8, 2)]],
    ("grad_query", "tf32"): [[(64, 32, 4, 2)], [(64, 32, 8, 2)]],
    ("grad_key_value", "tf32"): [[(32, 64, 4, 2)], [(32, 32, 8, 1)]],
    ("rows", "tf32"): [[(64, 64, 4, 2)], [(32, 32, 4, 2)]],
    ("forward", "ieee"): [[(32, 32, 4, 2)], [(16, 16, 4, 1)]],
    ("grad_query", "ieee"): [[(32, 16, 4, 1)], [(16, 16, 4, 1)]],
    ("grad_key_value", "ieee"): [[(16, 16, 4, 1)], [(16, 16, 8, 1)]],
    ("rows", "ieee"): [[(64, 64, 4, 2)], [(32, 32, 4, 2)]],
}  # fmt: skip


@SymbolicGridFn
def _query_grid(b: Any, h: Any, t: Any, _: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any]) -> tuple:
    return cdiv(t, meta["BLOCK_M"]), b * h, 1


@SymbolicGridFn
def _key_grid(b: Any, h: Any, t: Any, _: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any]) -> tuple:
    return cdiv(t, meta["BLOCK_N"]), b * h, 1


def _source(name: str) -> str:
    """Templates cannot import: the macros that all three share stand before each."""
    return load("attention_macros") + load(f"attention_{name}")


forward = TritonTemplate(name="mst_attention", grid=_query_grid, source=_source("forward"))
grad_query = TritonTemplate(name="mst_attention_grad_query", grid=_query_grid, source=_source("grad_query"))
grad_key_value = TritonTemplate(name="mst_attention_grad_key_value", grid=_key_grid, source=_source("grad_key_value"))
