"""Causal attention patterns: which keys a query attends to. Pure functions of positions.

The names are those of Mixed Sparsity Training's hybrid sparse attention (arXiv 2408.11746, section 3.3; ``strided`` and
``fixed`` are those of Sparse Transformers, arXiv 1904.10509):

========== ==========================================================================================
full       every key up to the query
local      the last ``window`` keys, the query's own included
strided    every key at a distance that ``stride`` divides, the query's own included
sparse     local or strided
fixed      the query's own chunk of ``stride`` positions, and the last position of every earlier chunk
blocks     keys whose chunk a given bool ``[chunks, chunks]`` allows for the query's chunk
========== ==========================================================================================

All are cut at the query: no pattern looks ahead.
"""

from __future__ import annotations

import torch
from torch import Tensor

PATTERNS = ("full", "local", "strided", "sparse", "fixed", "blocks")


def allowed(
    pattern: str,
    length: int,
    window: int,
    stride: int,
    blocks: Tensor | None = None,
    device: str | torch.device = "cpu",
) -> Tensor:
    """The dense mask of a pattern: bool ``[length, length]``, True where the query (row) attends to the key (column).

    Args:
        blocks: of ``"blocks"``: bool ``[chunks, chunks]`` with chunks of ``stride`` positions, the last may be partial.
    """
    query = torch.arange(length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    distance = query - key
    causal = distance >= 0
    if pattern == "full":
        return causal
    if pattern == "local":
        return causal & (distance < window)
    if pattern == "strided":
        return causal & (distance % stride == 0)
    if pattern == "sparse":
        return causal & ((distance < window) | (distance % stride == 0))
    if pattern == "fixed":
        return causal & ((query // stride == key // stride) | (key % stride == stride - 1))
    if pattern == "blocks" and blocks is not None:
        return causal & blocks.to(device=device, dtype=torch.bool)[query // stride, key // stride]
    raise ValueError(f"pattern {pattern!r} is none of {', '.join(PATTERNS)}, or its blocks are missing")


def pairs(pattern: str, length: int, window: int, stride: int) -> int:
    """Number of query-key pairs that a pattern allows among ``length`` positions: the sum of :func:`allowed`, without
    forming it. Not for ``"blocks"``, where it depends on the data."""
    query = torch.arange(length)
    far = query // stride + 1  # keys at a distance that ``stride`` divides
    near = (query + 1).clamp(max=window)
    keys = {
        "full": query + 1,
        "local": near,
        "strided": far,
        "sparse": near + far - far.clamp(max=(window - 1) // stride + 1),
        "fixed": query % stride + 1 + query // stride,
    }
    if pattern not in keys:
        raise ValueError(f"pattern {pattern!r} is none of {', '.join(keys)}")
    return int(keys[pattern].sum())
