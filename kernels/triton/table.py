"""Which tile a product gets where nothing is tuned, and from which density on it is dense.

Tuning takes seconds a product, so it is left to those who ask for it (``mode="max-autotune"``). The others get what was
the fastest on an H100 in bfloat16 at M = 16384, N = K = 4096 (``python -m benchmarks.gpu.sweep``, docs/gpu.md), or the
smallest tile where larger ones would leave multiprocessors without work. For other precisions, which were not measured,
and where a GPU cannot load as a tile does, the first one of the list serves. Every epilogue is fused; the one tile that
is wide, a chain of two, keeps 516 bytes a thread out of registers with the error function of an exact GELU and none
with others, and is 1.1 times as fast without any.

Bytes from the L2 cache decide between sparse and dense, and they grow with the products in all precisions alike, so
that one crossover a block serves, by the edge of the weight: products that take 100 us have no time to hide their
beginnings and ends. Those of narrow weights were measured at 3072 x 768 and 768 x 3072.

Of stacks of matrices nothing was measured. Their products are those of single ones but for two costs (grouped.py),
which are counted in full against a library that is taken to have neither, so that the crossover is a lower bound:

- The last tile of each group is partly filled. Half of it is wasted on average; a whole one of 128 rows is counted, so
  that groups of t rows take ``(t + 128) / t`` of the time.
- A program finds its group, 1 us. That is compared with the time that the dense product takes for what the program
  makes, at the rate of one of the 264 that run at once, 835 TFLOP/s / 264 = 3.2 TFLOP/s: ``2 * 128 B K`` operations in
  the forward pass and ``2 B^2 t`` in grad-weight, 42 us each for blocks of 128, K = 4096 and t = 4096. The mean share
  of the three products is added at any density.

A program that copies its matrix for every token, as ``stack[ids]`` does, reads or writes one at least once a token in
each of the three products; an H100 does so at 3.35 TB/s, by NVIDIA's data sheet, and in bfloat16 that takes 250 times
as long as the product of one token at the library's rate.

With these numbers and N = 14336 dense products take over at .74, not .78; with groups of 64 rows at .13, and with
groups of 16 at 0: always.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

from mst_compile.blocks.grid import BlockGrid

from .tiles import GEMM, GRAD_WEIGHT, GROUPED_GRAD_WEIGHT, GemmTile, GradWeightTile

_Tile = TypeVar("_Tile")

# Measured crossovers by block, of the three products together and of grad-weight (docs/gpu.md).
_NARROW = 2048  # features
_DENSE_FROM = {128: 0.78, 64: 0.44, 32: 0.25}
_NARROW_DENSE_FROM = {128: 0.56, 64: 0.44, 32: 0.24}
_GRAD_WEIGHT_DENSE_FROM = {128: 0.61, 64: 0.41, 32: 0.23}
_NARROW_GRAD_WEIGHT_DENSE_FROM = {128: 0.43, 64: 0.35, 32: 0.0}


def dense_from(grid: BlockGrid) -> float:
    """Density from which the three products of a weight take as long as dense ones."""
    known = _NARROW_DENSE_FROM if min(grid.rows, grid.cols) < _NARROW else _DENSE_FROM
    return known.get(grid.block, min(known.values()))


_WASTED_ROWS = 128  # of each group
_BEGINNING = 1e-6  # seconds in which a program finds its group
_PROGRAM_ROWS = 128
_RATE = 835e12  # operations a second of a dense product
_PROGRAM_RATE = _RATE / 264  # by the share of one program
_MEMORY = 3.35e12  # bytes a second


def grouped_shares(grid: BlockGrid, tokens: float) -> tuple[float, float]:
    """What the three products of a stack of matrices on this grid take at most, with that many rows each, as a share of
    dense ones by arithmetic: ``first + second * density``."""
    tokens = max(1.0, tokens)
    made = [_PROGRAM_ROWS * grid.block * reduced for reduced in (grid.rows, grid.cols)] + [grid.block**2 * tokens]
    beginning = sum(_BEGINNING * _PROGRAM_RATE / (2 * operations) for operations in made) / len(made)
    return beginning, (tokens + _WASTED_ROWS) / tokens / dense_from(grid)


def grouped_dense_from(grid: BlockGrid, tokens: float) -> float:
    """Density from which the three products of a stack of matrices may take as long as dense ones; 0 with few rows."""
    beginning, per_density = grouped_shares(grid, tokens)
    return max(0.0, (1 - beginning) / per_density)


def copied_times(element_size: int) -> float:
    """How many times as long as the product itself its dense form takes, at least, that copies the matrix for every
    token; ``element_size`` is that of the weight in bytes."""
    return 1 + element_size / _MEMORY * _RATE / 2


def _grad_weight_dense_from(grid: BlockGrid) -> float:
    narrow = min(grid.rows, grid.cols) < _NARROW
    return (_NARROW_GRAD_WEIGHT_DENSE_FROM if narrow else _GRAD_WEIGHT_DENSE_FROM)[grid.block]


# Up to which density a tile is taken, by (block, kind); see tiles.py.
_GEMM = {
    (128, "half"): [(0.15, GemmTile(128, 64, 8, 3)), (1.0, GemmTile(256, 64, 8, 3, chain=2, tma=True))],
    (64, "half"): [(0.2, GemmTile(128, 64, 4, 3)), (1.0, GemmTile(256, 32, 8, 4))],
    (32, "half"): [(1.0, GemmTile(256, 32, 4, 4))],
}
_GRAD_WEIGHT = {
    (128, "half"): [(1.0, GradWeightTile(1, 64, 4, 3))],
    (64, "half"): [(0.2, GradWeightTile(2, 64, 4, 3)), (1.0, GradWeightTile(4, 64, 8, 4))],
    (32, "half"): [(1.0, GradWeightTile(8, 64, 4, 2))],
}


def gemm(
    grid: BlockGrid, by_rows: bool, kind: str, density: float, tokens: int, processors: int, tma: bool
) -> GemmTile | None:
    """The tile for the forward pass or grad-input, None for the dense product.

    Args:
        by_rows: whether block rows make the result's columns.
        density: that training will mostly run at.
        tokens: rows of the result.
        processors: multiprocessors of the GPU.
        tma: whether it has a Tensor Memory Accelerator.
    """
    if density >= dense_from(grid):
        return None
    offered = GEMM[grid.block, kind]
    known = _GEMM.get((grid.block, kind))
    tile = _up_to(density, known) if known else offered[0]
    if tile.tma and not tma:
        tile = offered[0]
    if -(-tokens // (tile.rows * tile.chain)) * grid.lines(by_rows).count < processors:
        plain = (t for t in offered if t.chain == 1 and not (t.union or t.tma))
        return min(plain, key=lambda t: t.rows)
    return tile


def grad_weight(grid: BlockGrid, kind: str, density: float) -> GradWeightTile | None:
    """The tile for grad-weight, None for the dense product."""
    if density >= _grad_weight_dense_from(grid):
        return None
    known = _GRAD_WEIGHT.get((grid.block, kind))
    return _up_to(density, known) if known else GRAD_WEIGHT[grid.block, kind][0]


def grouped_gemm(
    offered: Sequence[GemmTile], grid: BlockGrid, lines: int, kind: str, density: float, tokens: int, matrices: int,
    processors: int,
) -> GemmTile:  # fmt: skip
    """The tile for a stack of matrices, of those offered.

    What is read grows with ``(rows + B) / rows``, and a group wastes half a tile: the least of the product, of tiles
    that are no taller than that of a single matrix of this density.

    Args:
        lines: of the result's columns.
        tokens: rows of all groups together, of which each is taken to have its share.
    """
    known = _GEMM.get((grid.block, kind))
    tallest = _up_to(density, known).rows if known else max(tile.rows for tile in offered)
    share = max(1.0, tokens / matrices)

    def cost(tile: GemmTile) -> float:
        return (1 + tile.rows / (2 * share)) * (1 + grid.block / tile.rows)

    tile = min((t for t in offered if t.rows <= tallest), key=cost, default=offered[0])
    if (-(-tokens // tile.rows) + matrices) * lines < processors:
        return min(offered, key=lambda t: t.rows)
    return tile


def grouped_grad_weight(offered: Sequence[GradWeightTile], block: int, kind: str, density: float) -> GradWeightTile:
    """The tile for grad-weight of a stack of matrices, of those offered."""
    known = _GRAD_WEIGHT.get((block, kind))
    wanted = _up_to(density, known) if known else GROUPED_GRAD_WEIGHT[block, kind][0]
    return wanted if wanted in offered else offered[0]


def _up_to(density: float, known: Iterable[tuple[float, _Tile]]) -> _Tile:
    return next(tile for most, tile in known if density <= most)
