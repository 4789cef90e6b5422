"""DOC
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

from mst_compile.rules.patterns import Parts

from . import load

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
    return [AttentionTile(*tile) for tile in _TILES[which, kind][column]]


# Columns: head sizes up to 64, 128 and 256. Every one is cross-compiled for sm_90 by the test suite and must not spill
# more than one register.
_TILES: dict[tuple[str, str], list[list[tuple[int, int, int, int]]]] = {
    ("forward", "half"): [[(64, 64, 4, 3), (128, 64, 8, 3)], [(64, 64, 8, 2), (64, 32, 4, 2)], [(32, 32, 8, 2)]],
    ("backward", "half"): [[(64, 64, 4, 2), (128, 32, 8, 2)], [(64, 32, 8, 2), (64, 16, 8, 2)], [(32, 32, 8, 1)]],
    ("forward", "tf32"): [[(64, 32, 4, 2)], [(64, 32, 8, 2)]],
    ("backward", "tf32"): [[(64, 32, 4, 2)], [(32, 32, 8, 1)]],
    ("forward", "ieee"): [[(32, 32, 4, 2)], [(16, 16, 4, 1)]],
    ("backward", "ieee"): [[(16, 16, 4, 1)], [(16, 16, 8, 1)]],
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
    """Templates cannot import: the macros that they share stand before each."""
    return "".join(load(f"attention_{name}") for name in ("macros", *names))


forward = TritonTemplate(name="mst_attention", grid=_forward_grid, source=_source("forward"))
backward = TritonTemplate(
    name="mst_attention_backward",
    grid=_backward_grid,
    source=_source("grad_query", "grad_key_value", "backward"),
)
