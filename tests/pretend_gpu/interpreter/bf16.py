"""Bfloat16 in Triton's interpreter: its bits in uint16, and the numbers they mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import TensorHandle


def is_bf16(handle: Any) -> bool:
    """Whether a handle of the interpreter holds bfloat16."""
    return handle.dtype.scalar == tl.bfloat16


def widen(handle: Any) -> np.ndarray:
    """The numbers of a handle: bfloat16 bits as float32 (exact), all else as it is."""
    if not is_bf16(handle):
        return handle.data
    return (np.asarray(handle.data).astype(np.uint32) << 16).view(np.float32)


def bf16_bits(numbers: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even, NaN kept: what the GPU's conversion does."""
    single = np.asarray(numbers, dtype=np.float32)
    bits = np.ascontiguousarray(single).reshape(single.shape).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(single), np.uint16(0x7FC0), rounded)


def bf16_handle(numbers: np.ndarray) -> Any:
    """A handle of the nearest bfloat16 numbers."""
    return TensorHandle(bf16_bits(numbers), tl.bfloat16)
