"""Products with stacks of block-sparse matrices: rows of the operand come in groups, each multiplied by its own matrix.

Where groups begin and end stands in memory of the GPU and differs from step to step, so that neither a grid nor a
kernel may depend on it, and the host does not wait for it. The loop nests::

    forward and grad-input
    for each slot of BLOCK_M rows, each line of blocks of its group's matrix:                         (one program)
        for each active block of the line, BLOCK_K of its elements at a time:
            acc[BLOCK_M, WIDTH] += a[rows of the group, the block's place along REDUCE] @ W_e[that place, line]
        out[rows of the group, line] = epilogue(acc)

    grad-weight
    for each matrix, each line of its blocks, each GATHER active blocks of it:                        (one program)
        for BLOCK_M tokens of the group at a time:
            acc[GATHER * BLOCK, BLOCK] += x[tokens, the blocks' columns]^T @ dy[tokens, line]
        grad[e, line, the blocks' columns] = acc
    for each matrix, each line of its blocks, GATHER blocks of it: zeros into the inactive ones       (one program)

**Which rows a program has.** A group of n rows from row s on, the e-th, has the slots from ``s // BLOCK_M + e`` up to
where the next group's begin: ``(s + n) // BLOCK_M - s // BLOCK_M + 1`` of them, at least the ``ceil(n / BLOCK_M)``
that it needs, since a remainder of s and one of n together may reach into one slot more. So ``M // BLOCK_M + E + 1``
slots hold any E groups, with the rows behind the last one as a group that no matrix multiplies (their results are 0),
and a program finds its group by a minimum over lanes that hold one offset each: an offset b, the j-th, says that
groups from the j-th on have their slots behind slot p if their number is more than ``p - b // BLOCK_M``, so that the
first one behind p is the least ``max(j, p - b // BLOCK_M + 1)``; the group before it is p's. Two maxima find where it
begins and ends, of all offsets so far, as they need not ascend. Nothing is looped over, as it would be where
persistent programs walk over all groups, and no launch of its own writes a table. A slot too many ends after that.

What it costs, by arithmetic, as no card has run it: a load from the L2 cache and three reductions over the lanes of a
warp (with more than 30 groups over warps too, through shared memory), 1 us at most, before the three loads that each
need the one before which a program of gather_gemm.py begins with too; and up to E + 1 slots a line that are left at
once, about as long each. The rest is that product's: the same loop (its macros), operands loaded and results stored
16 bytes a thread.

Arithmetic intensity is as in gather_gemm.py, 64 multiply-adds a 16-bit element at 128 x 128. Estimated from its rates
on an H100, 7 TB/s out of the L2 cache: Mixtral's 8 matrices of 14336 x 4096, 16384 tokens in two experts each, M =
32768 rows. In bfloat16 with blocks of 128 at density .1 the forward pass reads ``a`` .1 * 14336 / 128 = 11.2 times,
3.0 GB, and of the weights, active blocks alone, .1 * 2 * 14336 * 4096 B = 11.7 MB an expert for each of M / 128 = 256
tiles, 3.0 GB, and writes .94 GB: 6.9 GB, 1.0 ms, 390 TFLOP/s in active blocks. The slots add (8 + 1) / 256 to the
28672 programs; finding the group takes 1 us of the 9 that a program takes, which two of them on a multiprocessor may
hide. A dense product at 700 TFLOP/s takes 5.5 ms. Partly filled tiles cost half a tile a group on average: 3 % at
2048 rows each, half at 128.

**Grad-weight** writes the gradient in its own dtype, once: float32 partials of a whole stack, which is most of a
model, would be twice as large as it in bfloat16, and are not needed to fill the GPU, as each matrix has programs of
its own (at density .1 the stack above has 8 * 358 of them, where 264 run at once). No atomics either, and empty
groups get their zeros from the same store. Zeros of one matrix are written while products of the next ones run.

The sources are ``templates/grouped_gemm.py.jinja`` and ``templates/grouped_grad_weight.py.jinja``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

from . import source


def lanes(matrices: int) -> int:
    """How many lanes hold the bounds of that many groups: a power of two, and more than ``matrices`` + 1."""
    return 1 << (matrices + 1).bit_length()


@SymbolicGridFn
def _gemm_grid(m: Any, _: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any]) -> tuple[Any, int, int]:
    # M // BLOCK_M + 1 is cdiv(M + 1, BLOCK_M).
    return (cdiv(m + 1, meta["BLOCK_M"]) + meta["MATRICES"]) * meta["LINES"], 1, 1


gemm = TritonTemplate(
    name="mst_grouped_gemm", grid=_gemm_grid, source=source("gather_macros", "grouped_macros", "grouped_gemm")
)


@SymbolicGridFn
def _grad_weight_grid(_m: Any, _n: Any, meta: dict[str, Any]) -> tuple[int, int, int]:
    return 2 * meta["LINES"] * meta["GROUPS"], meta["MATRICES"], 1


grad_weight = TritonTemplate(
    name="mst_grouped_grad_weight", grid=_grad_weight_grid, source=source("grouped_macros", "grouped_grad_weight")
)
