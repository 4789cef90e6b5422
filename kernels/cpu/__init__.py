"""CPU kernels: block-sparse products and sparse attention in C++, compiled at first use and called through ctypes."""

from .attention import LSE_DTYPE, attention, attention_backward, supports_attention, supports_head
from .build import choose_isa, why_inductor_has_no_compiler
from .groups import grad_weight_groups, spmm_groups
from .library import (
    FINEST_BLOCK,
    available,
    block_sumsq,
    grad_weight,
    has_unit_stride,
    number_at,
    packed,
    packed_as_laid_out,
    source_hash,
    spmm,
    supports,
    supports_dtype,
    supports_packed,
    why_unavailable,
    zero_inactive_,
)
from .processor import processor_name

__all__ = [
    "FINEST_BLOCK",
    "LSE_DTYPE",
    "attention",
    "attention_backward",
    "available",
    "block_sumsq",
    "choose_isa",
    "grad_weight",
    "grad_weight_groups",
    "has_unit_stride",
    "number_at",
    "packed",
    "packed_as_laid_out",
    "processor_name",
    "source_hash",
    "spmm",
    "spmm_groups",
    "supports",
    "supports_attention",
    "supports_dtype",
    "supports_head",
    "supports_packed",
    "why_inductor_has_no_compiler",
    "why_unavailable",
    "zero_inactive_",
]
