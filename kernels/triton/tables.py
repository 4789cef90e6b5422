"""Tables of tensors for kernels that pass over any number of them in one launch.

Addresses, shapes and strides stand in a table on the device, and a map says what each program takes. The caching
allocator gives the gradients of one step the addresses of the step before, so that a table is uploaded once and found
again from then on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mst_compile.blocks.index import upload_

ALIGNMENT = 16  # bytes of one load or store


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy there; the host does not wait for it."""
    there = torch.empty_like(tensor, device=device)
    upload_(there, tensor)
    return there


def divides(size: int, addresses: Sequence[int], lengths: Sequence[int]) -> int:
    """Into how many elements of ``size`` bytes, up to a load's, all addresses (bytes) and lengths (elements) divide."""
    wanted = ALIGNMENT // size
    fits = all(address % ALIGNMENT == 0 for address in addresses) and all(length % wanted == 0 for length in lengths)
    return wanted if fits else 1


def program_map(shapes: Sequence[tuple[int, int]], block: int, width: int) -> list[list[int]]:
    """Which of the tensors of these shapes, block row and piece of ``width`` columns of it each program takes."""
    return [
        [i, row, piece]
        for i, (rows, cols) in enumerate(shapes)
        for row in range(-(-rows // block))
        for piece in range(-(-cols // width))
    ]


@functools.lru_cache(maxsize=1024)
def rows_of(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    """A table of these rows there, int64."""
    return upload(torch.tensor(rows, device="cpu"), device)


@functools.lru_cache(maxsize=1024)
def programs_of(shapes: tuple[tuple[int, int], ...], block: int, width: int, device: torch.device) -> Tensor:
    """The map there, int32. Of GPT-2 small 15000 programs, which take the host longer than a step may wait: they
    outlive the addresses."""
    return upload(torch.tensor(program_map(shapes, block, width), dtype=torch.int32, device="cpu"), device)
