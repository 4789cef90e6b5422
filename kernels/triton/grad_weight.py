"""grad-weight on the active blocks: ``grad[n, k] = sum over tokens of dy[token, n] x[token, k]``.

The loop nest::

    for each line of blocks, each GATHER active blocks of it, each of SPLIT parts of the tokens:      (one program)
        for BLOCK_M tokens at a time:
            acc[GATHER * BLOCK, BLOCK] += x[tokens, the blocks' columns]^T @ dy[tokens, line]
            the first program of a line also adds up dy's columns: the gradient of the bias
        partial[part, line, the blocks' columns] = acc

A line is what makes BLOCK output features: a block row of a weight stored ``[out, in]``, a block column of one stored
``[in, out]``. Partials are float32 and lie where the gradient will; nothing is ever written to the inactive blocks, and
no atomics are used: a second kernel adds the parts in a fixed order and writes exact zeros elsewhere, so that results
do not depend on scheduling. Where the index asks for a dense gradient all blocks of the line are taken.

That kernel (``templates/grad_weight_sum.py.jinja``) asks for each tile, not for each element, whether its block is
wanted: with a mask by element a thread loads single elements, and the sum took 60 us of 207 (4096 x 4096, blocks of
128, density .1), where reading 27 MB and writing 34 takes 20.

The product is transposed so that the gathered columns are the M dimension of the tensor core instruction, which must
be at least 64 wide: blocks of 32 then use wgmma too. Arithmetic intensity as in gather_gemm.py, with tiles of
GATHER * BLOCK x BLOCK; ``x`` is read again for every active block that it has a part in, whatever the tile: 430 MB for
blocks of 128 at M = 16384, N = K = 4096 and density .1, and as much of ``dy`` with GATHER = 1, which took 145 us on an
H100, 5.9 TB/s out of the L2 cache. Loads through descriptors were slower (164 us). How many parts the tokens are cut
into is splits.py's to say. The source is ``templates/grad_weight.py.jinja``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

from . import load


@dataclass(frozen=True)
class SumTile:
    """Whole rows of a block, which ``warps`` sum up, 32 elements a thread."""

    rows: int
    warps: int

    @classmethod
    def of(cls, block: int) -> SumTile:
        """That of a block, 4096 elements at most."""
        rows = min(block, 4096 // block)
        return cls(rows, max(1, rows * block // 1024))


@SymbolicGridFn
def _grid(_m: Any, _n: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any]) -> tuple[int, int, int]:
    return meta["LINES"] * meta["GROUPS"], meta["SPLIT"], 1


template = TritonTemplate(name="mst_grad_weight", grid=_grid, source=load("grad_weight"))


@SymbolicGridFn
def _sum_grid(rows: Any, _: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any]) -> tuple[Any, int, int]:
    return cdiv(rows, meta["TILE_ROWS"]) * meta["BLOCK_COLS"], 1, 1


sum_template = TritonTemplate(name="mst_grad_weight_sum", grid=_sum_grid, source=load("grad_weight_sum"))
