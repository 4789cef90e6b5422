"""Averages of squares that begin where blocks have just grown, for any number of weights in one launch.

A program reads one block of a gradient, for its mean square and once more out of the cache, and writes the same block
of what an optimizer keeps: nothing else is touched, and the host waits for no number. In PyTorch that is sixteen
launches and copies a weight, passes over all of it, and four waits, for the block's mean and the optimizer's step count
among them.

Sums are in the order of ``measure.py``, so that ranks with the same gradients begin with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from mst_compile.kernels.triton import tables
from torch import Tensor

from mst_compile.blocks.bulk import Average

_FLOATS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}
DTYPES = tuple(_FLOATS)
OPTIONS: dict[str, int] = {"num_warps": 1, "enable_fp_fusion": False}  # of its compilation


@triton.jit
def begin_averages(
    table, factors, programs, GRADIENT: tl.constexpr, AVERAGE: tl.constexpr, BLOCK: tl.constexpr, LEVELS: tl.constexpr
):  # fmt: skip
    """Program ``p`` writes, of pair ``programs[p, 0]``, the block in block row ``programs[p, 1]`` and block column
    ``programs[p, 2]``: the square of each element's gradient, or the block's mean where that is larger, times a factor.

    Args:
        table: int64 ``[pairs, 6]``: address of the gradient, of the average, rows, columns, row stride of the gradient,
            of the average.
        factors: float32 ``[pairs]``.
        programs: int32 ``[programs, 3]``.
        GRADIENT, AVERAGE: the elements' types.
        BLOCK, LEVELS: edge of a block, and its logarithm to base 2.
    """
    program = tl.program_id(0)
    pair = tl.load(programs + 3 * program)
    top = tl.load(programs + 3 * program + 1).to(tl.int64) * BLOCK
    first = tl.load(programs + 3 * program + 2) * BLOCK
    row = table + 6 * pair
    gradient = tl.load(row).to(tl.pointer_type(GRADIENT))
    average = tl.load(row + 1).to(tl.pointer_type(AVERAGE))
    height, width = tl.load(row + 2), tl.load(row + 3)
    from_row, to_row = tl.load(row + 4), tl.load(row + 5)
    factor = tl.load(factors + pair)
    columns = first + tl.arange(0, BLOCK)
    inside = columns < width
    sums = tl.full([BLOCK], 0.0, tl.float32)
    for i in range(BLOCK):
        at = tl.full([BLOCK], 0, tl.int64) + (top + i)
        x = tl.load(gradient + at * from_row + columns, mask=inside & (at < height), other=0).to(tl.float32)
        sums += x * x
    for level in tl.static_range(LEVELS):
        left, right = tl.split(tl.reshape(sums, [BLOCK >> (level + 1), 2]))
        sums = left + right
    count = tl.minimum(height - top, BLOCK) * tl.minimum(width - first, BLOCK)
    mean = sums / count.to(tl.float32)
    for i in range(BLOCK):
        at = tl.full([BLOCK], 0, tl.int64) + (top + i)
        there = inside & (at < height)
        x = tl.load(gradient + at * from_row + columns, mask=there, other=0).to(tl.float32)
        tl.store(average + at * to_row + columns, (tl.maximum(x * x, mean) * factor).to(AVERAGE), mask=there)


def constants(gradient: torch.dtype, average: torch.dtype, block: int) -> dict[str, object]:
    """Compile-time arguments of the kernel."""
    return {
        "GRADIENT": _FLOATS[gradient], "AVERAGE": _FLOATS[average], "BLOCK": block, "LEVELS": block.bit_length() - 1
    }  # fmt: skip


def _factors(averages: Sequence[Average], scale: float) -> Tensor:
    """float32 ``[n]`` where the averages are. What depends on a step count there is computed there."""
    device = averages[0].average.device
    betas = torch.tensor([a.beta for a in averages], dtype=torch.float64, device="cpu")
    counts = [a.steps for a in averages]
    there = [isinstance(count, Tensor) and count.device == device for count in counts]
    if any(there):
        zero = None if all(there) else torch.zeros((), dtype=torch.float32, device=device)
        steps = torch.stack([c.detach().float() if t else zero for c, t in zip(counts, there, strict=True)])  # type: ignore[union-attr, misc]
        here = [0.0 if t else float(count) for count, t in zip(counts, there, strict=True)]
        known = torch.tensor(here, dtype=torch.float64, device="cpu")
        both = tables.upload(torch.stack([betas, known]), device)
        factors = (1 - both[0] ** (steps.double() + both[1] + 1)) / (scale * scale)
        return factors.float()
    known = torch.tensor([float(count) for count in counts], dtype=torch.float64, device="cpu")
    return tables.upload(((1 - betas ** (known + 1)) / (scale * scale)).float(), device)


def begin(averages: Sequence[Average], scale: float) -> None:
    """Begin all the averages, of one GPU, whose gradients are ``scale`` times too large."""
    groups: dict[tuple[int, torch.dtype, torch.dtype], list[Average]] = {}
    for one in averages:
        if bool(one.blocks.any()):
            groups.setdefault((one.grid.block, one.gradient.dtype, one.average.dtype), []).append(one)
    for (block, gradient, average), own in groups.items():
        device = own[0].average.device
        places = tuple(
            (a.gradient.data_ptr(), a.average.data_ptr(), *a.average.shape, a.gradient.stride(0), a.average.stride(0))
            for a in own
        )
        grown = [a.blocks.nonzero().int() for a in own]
        numbers = [torch.full((len(blocks), 1), i, dtype=torch.int32, device="cpu") for i, blocks in enumerate(grown)]
        programs = torch.cat([torch.cat(numbers), torch.cat(grown)], 1)
        with torch.cuda.device(device):
            begin_averages[len(programs),](
                tables.rows_of(places, device), _factors(own, scale), tables.upload(programs, device),
                **constants(gradient, average, block), **OPTIONS,
            )  # fmt: skip
