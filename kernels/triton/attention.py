"""Attention over the parts of a causal pattern, forward and backward, one online-softmax loop nest for all of them.

Forward::

    for each batch and head, each tile of BLOCK_M queries, the last ones first as they see most:      (one program)
        a run: tiles of BLOCK_N keys that every query sees; tiles that only some see, masked
        summaries: tiles of summary keys, gathered from the ends of the chunks before
        or distances, a launch of their own: tiles of BLOCK_N keys of the queries' residues
            update maxima, denominators and the weighted sum of values

At distances, queries whose positions are congruent modulo the step share their keys: those at places up to their own in
a sequence of every step-th key, shifted by ``first``. A tile is one of such sequences, or holds PACK neighbouring
residues side by side where they are short; a query sees the keys of its own residue. With a run besides, distances come
first, and the launch of the run goes on from their result as if it were one key, whose score is the logarithm of the
denominator. That result is rounded to the operands' dtype: its error, weighted by no more than 1, is that of rounding
the final result once more, half of eps where probabilities err by as much already; in float32 it would be 50 MB more to
move in the example below, 17 us.

The backward pass recomputes the probabilities, in one launch a part: of its programs, some walk the keys of a query
tile for grad-query, the others the queries of a key tile, and the heads of its group, for grad-key and grad-value. A
launch adds to what the one before it has written, in its accumulators before they are rounded. Nothing is added by
atomics.

Programs of one batch and head run side by side, so that what they share is in L2, and launches take turns in which head
they begin with, so that the last heads of one are found by the next.

Bytes, of a tensor of 4 x 12 heads, 4096 positions, 64 features in bfloat16: 25 MB, 8.4 us from memory at 3 TB/s or 4.6
us from L2 at 5.5 TB/s. Window and stride 128, tiles of 64 x 64, in tensors::

    launch                 from and to memory                           through L2
    forward, distances     q k v, out: 4                34 us           as many: 4                           18 us
    forward, run           q k v out, out: 5            42 us           q out out, 3 tiles of k v: 9         41 us
    delta                  do out: 2                    17 us           2                                     9 us
    backward, run          q k v do, dq dk dv: 7        59 us           4 own, 12 walked over, 3 written: 19  87 us
    backward, distances    q k v do, 3 read and         84 us           4 own, 4 walked over, 3 read and      64 us
                           written: 10                                  written: 14

So 76 us forward and 160 us (188 us, as the run's is bound by L2) backward at best. The operations, 192 keys a query in
the run and 64 at distances, are 10 and 3 GFLOP forward, 34 and 11 backward, or 13 and 46 us at the tensor core's peak.
Tiles of 128 x 64 in the run would take 32 us of L2 forward and 69 backward for 4/3 of the operations.

The sources are ``templates/attention_*.py.jinja``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

from mst_compile.rules.patterns import Parts

from . import source

_FAR = 2**29  # further than any two positions, which are int32 here, as are sums of two such numbers


@dataclass(frozen=True)
class AttentionTile:
    """A program owns ``own`` queries (in the backward pass: or keys) and walks over keys (or queries) ``walked`` at a
    time."""

    own: int
    walked: int
    warps: int
    stages: int


def constants(parts: Parts) -> dict[str, int]:
    """The parts as constants of the templates: their numbers, and whether the window holds all keys."""
    numbers = {name.upper(): min(number, _FAR) for name, number in vars(parts).items()}
    return numbers | {"UNBOUNDED": parts.window >= _FAR}


def pack(tile: AttentionTile, parts: Parts, length: int) -> int:
    """Residues that share a tile of keys at distances: a power of two, for sequences of about ``length`` positions.

    A tile holds all positions of its residues if they are few enough, else one residue. Any number is right for any
    length.
    """
    if not parts.step:
        return 1
    chunks = max(1, -(-length // parts.step))
    fits = min(tile.own, tile.walked) >> (chunks - 1).bit_length()
    return max(1, min(fits, 1 << (parts.step.bit_length() - 1)))


def tiles(size: int, kind: str, which: str, parts: Parts) -> list[AttentionTile]:
    """Tiles to choose from for a head size, ``kind`` ("half", "tf32" or "ieee", see tiles.py), kernel ("forward" or
    "backward") and its parts."""
    column = 0 if size <= 64 else 1 if size <= 128 else 2
    found = [AttentionTile(*tile) for tile in _TILES[which, kind][column]]
    if which == "backward" and 0 < parts.window < _FAR:  # a short walk: 116 us in place of 138 on an H100
        found.sort(key=lambda tile: (tile.own, tile.walked))
    return found


# Columns: head sizes up to 64, 128 and 256. Every one is cross-compiled for sm_90 by the test suite and must not spill
# more than one register.
_TILES: dict[tuple[str, str], list[list[tuple[int, int, int, int]]]] = {
    ("forward", "half"): [[(64, 64, 4, 3), (128, 64, 8, 3)], [(64, 64, 8, 2), (64, 32, 4, 2)], [(64, 32, 8, 2)]],
    ("backward", "half"): [
        [(64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2)],
        [(64, 32, 8, 2), (64, 64, 8, 2)],
        [(32, 32, 8, 2)],
    ],
    ("forward", "tf32"): [[(64, 32, 4, 2)], [(64, 32, 8, 2)]],
    ("backward", "tf32"): [[(64, 32, 4, 2)], [(32, 32, 8, 1)]],
    ("forward", "ieee"): [[(32, 32, 4, 2)], [(16, 16, 4, 2)]],
    ("backward", "ieee"): [[(16, 16, 4, 1)], [(16, 16, 4, 1)]],
}  # fmt: skip


def _tiles(count: Any, meta: dict[str, Any], cdiv: Callable[..., Any], min_: Callable[..., Any]) -> Any:
    """Tiles of ``count`` positions."""
    if not meta["STEP"]:
        return cdiv(count, meta["BLOCK_M"])
    groups = cdiv(min_(count, meta["STEP"]), meta["PACK"])
    return groups * cdiv(cdiv(count, meta["STEP"]) * meta["PACK"], meta["BLOCK_M"])


@SymbolicGridFn
def _forward_grid(
    b: Any, h: Any, t: Any, _: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any], min: Callable[..., Any]
) -> tuple:
    return _tiles(t, meta, cdiv, min), b * h, 1


@SymbolicGridFn
def _backward_grid(
    b: Any, h: Any, t: Any, _: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any], min: Callable[..., Any]
) -> tuple:
    keys = t // meta["SUMMARY"] if meta["SUMMARY"] else t
    tiles = _tiles(keys, meta, cdiv, min) + meta["GROUP"] * _tiles(t, meta, cdiv, min)
    return tiles, b * (h // meta["GROUP"]), 1


def _source(*names: str) -> str:
    return source(*(f"attention_{name}" for name in ("macros", *names)))


forward = TritonTemplate(name="mst_attention", grid=_forward_grid, source=_source("forward"))
backward = TritonTemplate(
    name="mst_attention_backward",
    grid=_backward_grid,
    source=_source("grad_query", "grad_key_value", "backward"),
)
