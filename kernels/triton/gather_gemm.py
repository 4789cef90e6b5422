"""Forward and grad-input: a product with a block-sparse matrix, ``out[M, OUT] = a[M, REDUCE] W``.

The loop nest::

    for each tile of BLOCK_M rows, each line of blocks of W that makes WIDTH columns of the output:   (one program)
        for each active block of the line, BLOCK_K of its elements at a time (or two blocks at once):
            acc[BLOCK_M, WIDTH] += a[rows, the block's place along REDUCE] @ W[that place, line]
        out[rows, line] = epilogue(acc)

A line is a block row of a weight stored ``[out, in]`` in the forward pass (a block column in grad-input, and the other
way round for weights stored ``[in, out]``), or a union of neighbouring ones, of which the index keeps the columns that
any of them has: then blocks that are not active are multiplied too, as the exact zeros that they hold, and the tile is
wider.

Arithmetic intensity: a step moves ``BLOCK_K (BLOCK_M + WIDTH)`` elements for ``BLOCK_K BLOCK_M WIDTH`` multiply-adds,
so 64 a 16-bit element at 128 x 128, 51 at 256 x 64, 28 at 256 x 32. Nothing is shared between programs but the L2
cache, so narrow blocks are bound by it; that is what unions are for.

Three things make it fast, each seen in the generated code:

- The place of the next block is loaded in the step before, in a loop-carried variable. A load of ``a`` that depends on
  a load of the same step makes Triton split its pipeline stages over the two, and leaves half the buffers.
- Features and strides are constants. With a symbolic stride there is no asynchronous copy at all.
- Tokens are the M dimension of the tensor core instruction, so that blocks of 32 and 64 use wgmma too.

Triton functions cannot import, hence one source text, ``templates/gather_gemm.py.jinja``, completed by Inductor
(``torch._inductor.select_algorithm``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

from . import load


@SymbolicGridFn
def _grid(m: Any, _: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any]) -> tuple[Any, int, int]:
    return cdiv(m, meta["BLOCK_M"] * meta["CHAIN"]) * meta["LINES"], 1, 1


template = TritonTemplate(name="mst_gather_gemm", grid=_grid, source=load("gather_gemm"))
