"""grad-weight on the active blocks: ``grad[n, k] = sum over tokens of dy[token, n] x[token, k]``.

The loop nest::

    for each line of blocks, each GATHER active blocks of it, each of SPLIT parts of the tokens:      (one program)
        for BLOCK_M tokens at a time:
            acc[GATHER * BLOCK, BLOCK] += x[tokens, the blocks' columns]^T @ dy[tokens, line]
            the first program of a line also adds up dy's columns: the gradient of the bias
        partial[part, line, the blocks' columns] = acc

A line is what makes BLOCK output features: a block row of a weight stored ``[out, in]``, a block column of one stored
``[in, out]``. Partials are float32 and lie where the gradient will; nothing is ever written to the inactive blocks, and
no atomics are used: the lowering adds the parts in a fixed order and writes exact zeros elsewhere, so that results do
not depend on scheduling. Where the index asks for a dense gradient all blocks of the line are taken.

The product is transposed so that the gathered columns are the M dimension of the tensor core instruction, which must
be at least 64 wide: blocks of 32 then use wgmma too. Arithmetic intensity as in gather_gemm.py, with tiles of
GATHER * BLOCK x BLOCK.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

# Constants that the lowering gives: BLOCK, LINES, LENGTH (blocks that a line crosses), PTR, IDX, ORDER (see
# blocks.grid.Lines), DENSE_GRAD (offset of the flag), OUT, IN (features), ROWS (of the stored weight), OUT_FIRST (it is
# stored [out, in]), X_STRIDE, DY_STRIDE, SPLIT, GROUPS (programs a line), BIAS; and the tile: GATHER, BLOCK_M,
# PRECISION.
SOURCE = r"""
{% if BIAS %}
{{def_kernel("X", "DY", "INDEX", "COLUMN_SUMS")}}
{% else %}
{{def_kernel("X", "DY", "INDEX")}}
{% endif %}
    M = {{size("X", 0)}}
    TILE: tl.constexpr = GATHER * BLOCK
    line = tl.load(INDEX + ORDER + tl.program_id(0) // GROUPS)
    part = tl.program_id(0) % GROUPS
    split = tl.program_id(1)
    dense = tl.load(INDEX + DENSE_GRAD) != 0
    start = tl.load(INDEX + PTR + line)
    count = tl.where(dense, LENGTH, tl.load(INDEX + PTR + line + 1) - start)

    tile = tl.arange(0, TILE)
    slot = part * GATHER + tile // BLOCK
    present = slot < count
    listed = tl.load(INDEX + IDX + start + slot, mask=present & (slot < LENGTH) & (not dense), other=0)
    place = tl.where(dense, slot, listed)
    k = place * BLOCK + tile % BLOCK
    present = present & (k < IN)
    k = tl.max_contiguous(tl.multiple_of(k, {{[BLOCK, 16] | min}}), {{[BLOCK, 16] | min}})
    n = line * BLOCK + tl.arange(0, BLOCK)

    chunk = tl.cdiv(tl.cdiv(M, SPLIT), BLOCK_M) * BLOCK_M
    low = split * chunk
    high = min(low + chunk, M)
    rm = tl.arange(0, BLOCK_M)
    acc = tl.zeros((TILE, BLOCK), dtype=tl.float32)
{% macro tokens(column_sums) %}
            token = (m + rm).to(INDEX_DTYPE)
            inside = (token < M)[:, None]
            x = tl.load(X + token[:, None] * X_STRIDE + k[None, :], mask=inside & present[None, :], other=0.0)
            dy_inside = inside{{" & (n < OUT)[None, :]" if OUT % BLOCK else ""}}
            dy = tl.load(DY + token[:, None] * DY_STRIDE + n[None, :], mask=dy_inside, other=0.0)
            acc = tl.dot(tl.trans(x), dy, acc, input_precision=PRECISION)
{% if column_sums %}
            sums += tl.sum(dy.to(tl.float32), 0)
{% endif %}
{% endmacro %}
{% if BIAS %}
    if part == 0:  # also of a line without active blocks
        sums = tl.zeros((BLOCK,), dtype=tl.float32)
        for m in range(low, high, BLOCK_M):
{{tokens(True)}}
        tl.store(COLUMN_SUMS + split * OUT + n, sums, mask=n < OUT)
    elif part * GATHER < count:
{% else %}
    if part * GATHER < count:
{% endif %}
        for m in range(low, high, BLOCK_M):
{{tokens(False)}}

{% if OUT_FIRST %}
    idx_m = (split * ROWS + n)[None, :].to(INDEX_DTYPE)
    idx_n = k[:, None]
{% else %}
    idx_m = (split * ROWS + k)[:, None].to(INDEX_DTYPE)
    idx_n = n[None, :]
{% endif %}
    mask = present[:, None] & (n < OUT)[None, :]
    {{store_output(("idx_m", "idx_n"), "acc", "mask", val_shape=("TILE", "BLOCK"))}}
"""


@SymbolicGridFn
def _grid(_m: Any, _n: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any]) -> tuple[int, int, int]:
    return meta["LINES"] * meta["GROUPS"], meta["SPLIT"], 1


template = TritonTemplate(name="mst_grad_weight", grid=_grid, source=SOURCE)
