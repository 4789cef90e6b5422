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

Triton functions cannot import, hence one source text, completed by Inductor (``torch._inductor.select_algorithm``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

# Constants that the lowering gives: BLOCK (edge of a block), OUT, REDUCE (features), LINES, WIDTH, PTR, IDX, ORDER (see
# blocks.grid.Lines), A_STRIDE, W_STRIDE (elements between rows), REDUCE_LAST (W's reduced dimension is the contiguous
# one), EVEN_M (BLOCK_M divides M); and the tile: BLOCK_M, BLOCK_K, GROUP_M, PRECISION.
SOURCE = r"""
{{def_kernel("A", "W", "INDEX")}}
    M = {{size("A", 0)}}
    # GROUP_M row tiles share the weight's blocks in L2; among them the long lines come first.
    pid = tl.program_id(0)
    num_m = tl.cdiv(M, BLOCK_M)
    span = GROUP_M * LINES
    first_m = (pid // span) * GROUP_M
    group = min(num_m - first_m, GROUP_M)
    pid_m = first_m + (pid % span) % group
    line = tl.load(INDEX + ORDER + (pid % span) // group)
    start = tl.load(INDEX + PTR + line)
    end = tl.load(INDEX + PTR + line + 1)

    rm = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    rn = line * WIDTH + tl.arange(0, WIDTH)
    rk = tl.arange(0, BLOCK_K)
{% if EVEN_M %}
    row = tl.max_contiguous(tl.multiple_of(rm, BLOCK_M), BLOCK_M).to(INDEX_DTYPE)
{% else %}
    row = tl.where(rm < M, rm, 0).to(INDEX_DTYPE)  # rows past the end are computed and never stored
{% endif %}
    a_rows = A + row[:, None] * A_STRIDE
{% if REDUCE_LAST %}
    # A line past the end of the weight reads row 0, which is never stored either.
    w_line = W + {{"tl.where(rn < OUT, rn, 0)" if OUT % WIDTH else "rn"}}[None, :].to(INDEX_DTYPE) * W_STRIDE
{% else %}
    w_line = W + rn[None, :]
{% endif %}
    acc = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
{% if BLOCK_K <= BLOCK %}
    STEPS: tl.constexpr = BLOCK // BLOCK_K
    place = tl.load(INDEX + IDX + start, mask=start < end, other=0)
    for t in range(start * STEPS, end * STEPS):
        off = (tl.multiple_of(place * BLOCK + (t % STEPS) * BLOCK_K, BLOCK_K) + rk).to(INDEX_DTYPE)
        following = (t + 1) // STEPS
        place = tl.load(INDEX + IDX + following, mask=following < end, other=0)
{% else %}
    # Two blocks a step; the second of an odd line's last pair is masked.
    place = tl.load(INDEX + IDX + start, mask=start < end, other=0)
    second = tl.load(INDEX + IDX + start + 1, mask=start + 1 < end, other=0)
    for t in range(start, end, 2):
        off = tl.where(
            rk < BLOCK, tl.multiple_of(place * BLOCK, BLOCK) + rk, tl.multiple_of(second * BLOCK, BLOCK) + (rk - BLOCK)
        )
        off = tl.max_contiguous(off, BLOCK).to(INDEX_DTYPE)
        present = (rk < BLOCK) | (t + 1 < end)
        place = tl.load(INDEX + IDX + t + 2, mask=t + 2 < end, other=0)
        second = tl.load(INDEX + IDX + t + 3, mask=t + 3 < end, other=0)
{% endif %}
{% set conditions = [] %}
{% if BLOCK_K > BLOCK %}{% set _ = conditions.append("present") %}{% endif %}
{% if REDUCE % BLOCK %}{% set _ = conditions.append("(off < REDUCE)") %}{% endif %}
{% set inside = conditions | join(" & ") %}
{% if inside %}
        inside = {{inside}}
        a = tl.load(a_rows + off[None, :], mask=inside[None, :], other=0.0)
{% else %}
        a = tl.load(a_rows + off[None, :])
{% endif %}
{% set w_inside = [] %}
{% if inside %}{% set _ = w_inside.append("inside[:, None]") %}{% endif %}
{% if not REDUCE_LAST and OUT % WIDTH %}{% set _ = w_inside.append("(rn < OUT)[None, :]") %}{% endif %}
{% set w_mask = ", mask=" ~ w_inside | join(" & ") ~ ", other=0.0" if w_inside else "" %}
        w = tl.load(w_line + off[:, None]{{"" if REDUCE_LAST else " * W_STRIDE"}}{{w_mask}})
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    idx_m = rm[:, None].to(INDEX_DTYPE)
    idx_n = rn[None, :]
    mask = (idx_m < M) & (idx_n < OUT)
    {{store_output(("idx_m", "idx_n"), "acc", "mask", val_shape=("BLOCK_M", "WIDTH"))}}
"""


@SymbolicGridFn
def _grid(m: Any, _: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any]) -> tuple[Any, int, int]:
    return cdiv(m, meta["BLOCK_M"]) * meta["LINES"], 1, 1


template = TritonTemplate(name="mst_gather_gemm", grid=_grid, source=SOURCE)
