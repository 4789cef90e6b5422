"""CPU kernels: block-sparse products in C++, compiled at first use and called through ctypes."""

from .library import (
    available,
    block_sumsq,
    grad_weight,
    source_hash,
    spmm,
    supports,
    why_unavailable,
    zero_inactive_,
)

__all__ = [
    "available",
    "block_sumsq",
    "grad_weight",
    "source_hash",
    "spmm",
    "supports",
    "why_unavailable",
    "zero_inactive_",
]
