"""What the machine code of our templates of products must be like, by the tile that it was made for."""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from mst_compile.kernels.triton import tiles
from pretend_gpu import GeneratedKernel, check, cross_compile

F32 = torch.float32


def kind_of(kernel: GeneratedKernel) -> str:
    return "sum" if "arg_PARTIALS" in kernel.source else "grad_weight" if "GROUPS" in kernel.source else "gemm"


def sizes_of_accesses(kernel: GeneratedKernel, dtype: torch.dtype, *, tf32: bool) -> dict[str, Any]:
    """Bounds for `check`: operands are read by 16 bytes a thread where a tile has as many, and so are partials written.

    TF32 products want the reduced dimension contiguous: an operand that has the other so is transposed on its way into
    shared memory, element by element.
    """
    values = dict(re.findall(r"(\w+) : tl.constexpr = (\w+)", kernel.source))
    if values.get("TMA") == "True":
        return {}
    size = {name: int(value) for name, value in values.items() if value.isdigit()}

    def bytes_of(*tile: str, reduced_last: bool) -> int:
        elements = math.prod(size[name] for name in tile) // (32 * kernel.num_warps)
        return min(16, (1 if tf32 and not reduced_last else elements) * dtype.itemsize)

    if kind_of(kernel) == "gemm":
        a = bytes_of("BLOCK_M", "BLOCK_K", reduced_last=True)
        w = bytes_of("BLOCK_K", "WIDTH", reduced_last=values["REDUCE_LAST"] == "True")
        return {"reads": {"arg_A": a, "arg_W": w}}
    x = bytes_of("BLOCK_M", "GATHER", "BLOCK", reduced_last=False)
    dy = bytes_of("BLOCK_M", "BLOCK", reduced_last=False)
    return {"reads": {"arg_X": x, "arg_DY": dy}, "writes": {"out_ptr0": 16}}


def check_tile(tile: Any, kernel: GeneratedKernel, block: int, dtype: torch.dtype, kind: str) -> None:
    """Hold the machine code of one tile against what it asks for."""
    facts, gemm, wgmma = cross_compile(kernel), isinstance(tile, tiles.GemmTile), kind != "ieee"
    check(
        facts,
        wgmma=wgmma,
        # The column sums of grad-weight hold on to a buffer of dy for one step longer; IEEE products read their
        # operands from shared memory into registers one step ahead.
        stages=kernel.num_stages - (not gemm or not wgmma),
        spills=0,
        atomics=0,
        shared=tile.shared(block, dtype.itemsize),
        **sizes_of_accesses(kernel, dtype, tf32=kind == "tf32"),
    )
    if wgmma:
        by_descriptor = gemm and tile.tma
        assert bool(facts.tma) == by_descriptor
        assert bool(facts.cp_async) != by_descriptor
    if gemm:
        # A product is waited for before the loop's next one is issued; only where a row tile ends, for all.
        waits = "".join(re.findall(r"wgmma\.wait_group\.sync\.aligned (\d)", facts.ptx))
        assert waits == ("" if not wgmma else "100" if tile.chain > 1 else "10")
