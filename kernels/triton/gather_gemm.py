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

What bounds it on an H100, by the times of docs/gpu.md, is the L2 cache: M = 16384, N = K = 4096 in bfloat16 at density
.1 and blocks of 128 reads 859 MB with tiles of 128 rows, in 145 us, which is 5.9 TB/s; .3 with tiles of 256 reads 1.9
GB in 306 us, 6.3 TB/s; blocks of 64 and 32 run at 6.9 and 6.4 TB/s. ``a`` is read ``density OUT / B`` times whatever
the tile, the weight ``M / BLOCK_M`` times. At density .1 ``a`` alone is 1.7 GB for blocks of 32, so 250 us or 2.6 times
dense, and .86 GB or 125 us for blocks of 64. Hence the choices:

- A chain: a program does several row tiles of one line in one loop (Triton's ``flatten``), whose first loads are issued
  while the tile before is multiplied and stored. Tiles of 256 rows, which alone on a multiprocessor wait for their
  first loads and their store every six steps, read 645 MB in place of 859 MB at B = 128 and .1: 100 to 110 us, 5.9 to
  6.5 times dense. They take 3 (256 + 128) 64 2 = 144 KiB of buffers and 32 KiB for the store; of 227.
- Descriptors (``tl.make_tensor_descriptor``): a block is a rectangle, so the Tensor Memory Accelerator loads it without
  addresses in registers (167 of 255 a thread in place of 218 to 225 for the tile above). Others measured 1.06 to 1.09
  times on grouped products. Inductor sets Triton's allocator for them before each launch, in the backward thread too.
- Specialized warps: one warp group loads, two multiply. Triton takes this for loops of descriptors with four warps,
  and with numbers carried from step to step it fails to compile, so a block's place is loaded in the step that needs
  it; only the loading warps wait for that.

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
