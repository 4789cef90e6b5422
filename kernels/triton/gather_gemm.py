"""Forward and grad-input: a product with a block-sparse matrix, ``out[M, OUT] = a[M, REDUCE] W``.

The loop nest::

    for each CHAIN tiles of BLOCK_M rows, each line of blocks of W that makes WIDTH columns:          (one program)
      for each of the tiles:
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

What bounds it on an H100 is what the L2 cache gives, about 7 TB/s. ``a`` is read ``density OUT / B`` times whatever
the tile, the weight ``M / BLOCK_M`` times. M = 16384, N = K = 4096 in bfloat16 at density .1 with blocks of 128 reads
859 MB with tiles of 128 rows and writes 134 MB, in 140 us; without the store it takes 122 us, and with ``a`` cut to
rows that stay in the cache no less. Nsight Compute counts 262 MB from and to memory, which is each operand once, and
the tensor cores busy for 41 % of the time. With blocks of 32 ``a`` alone is 1.7 GB, the cache is busy for 96 % of the
time, and 2.3 times dense is what there is. What was tried on the card, with its result (docs/gpu.md):

- Order: all lines for 512 rows, then the next 512. With 1024 rows a product takes 150 us, not 141, with 4096 172.
- A chain: a program does several row tiles of one line in one loop (Triton's ``flatten``), whose first loads are issued
  while the tile before is multiplied and stored. Two tiles of 256 rows that load through descriptors
  (``tl.make_tensor_descriptor``: the Tensor Memory Accelerator needs no addresses in registers) read 645 MB, but are
  alone on a multiprocessor and wait at barriers: the fastest from density .3 on (290 us against 320), not below (155
  against 141). They take 3 (256 + 128) 64 2 = 144 KiB of buffers and 32 KiB for the store; of 227. Inductor sets
  Triton's allocator for descriptors before each launch, in the backward thread too.
- Nothing gained: descriptors alone (178 us), stores through descriptors (163 us), hints to keep ``a`` in the cache and
  ``out`` out of it (149 of 150 us), one load of a line's four numbers in place of three that wait for each other (2 %).
- Warps of their own for loading (``warp_specialize``) gave wrong numbers on the card under Triton 3.6, and were slower.

Three things make it fast, each seen in the generated code:

- The place of the next block is loaded in the step before, in a loop-carried variable. A load of ``a`` that depends on
  a load of the same step makes Triton split its pipeline stages over the two, and leaves half the buffers.
- Features and strides are constants. With a symbolic stride there is no asynchronous copy at all.
- Tokens are the M dimension of the tensor core instruction, so that blocks of 32 and 64 use wgmma too.

Triton functions cannot import, hence one source text, ``templates/gather_gemm.py.jinja`` behind the macros that it
shares with grouped.py, completed by Inductor (``torch._inductor.select_algorithm``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

from . import source


@SymbolicGridFn
def _grid(m: Any, _: Any, meta: dict[str, Any], *, cdiv: Callable[..., Any]) -> tuple[Any, int, int]:
    return cdiv(m, meta["BLOCK_M"] * meta["CHAIN"]) * meta["LINES"], 1, 1


template = TritonTemplate(name="mst_gather_gemm", grid=_grid, source=source("gather_macros", "gather_gemm"))
