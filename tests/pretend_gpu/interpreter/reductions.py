"""Reductions and scans in Triton's interpreter.

The stock ones add bfloat16's bits as integers; and with any combining function but the commonest they call it once per
element, which takes seconds for one layer norm. Here it is called on whole slices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock

from .bf16 import bf16_handle, is_bf16, widen


def _wide(x: Any) -> Any:
    if not is_bf16(x.handle):
        return x
    type_ = tl.block_type(tl.float32, list(x.shape)) if x.type.is_block() else tl.float32
    return tl.tensor(stock.TensorHandle(widen(x.handle), tl.float32), type_)


def _narrow(x: Any) -> Any:
    type_ = tl.block_type(tl.bfloat16, list(x.shape)) if x.type.is_block() else tl.bfloat16
    return tl.tensor(bf16_handle(x.handle.data), type_)


def _in_float32(original: Callable[..., Any]) -> Callable[..., Any]:
    """Run a reduction or scan of bfloat16 in float32 and round at the end."""

    def apply_impl(self: Any, inputs: tuple[Any, ...]) -> Any:
        narrow = [is_bf16(x.handle) for x in inputs]
        found = original(self, tuple(_wide(x) for x in inputs))
        many = list(found) if isinstance(found, list | tuple) else [found]
        # A reduction may return fewer (the maximum alone) or an index beside the value.
        return [_narrow(x) if n and x.dtype == tl.float32 else x for x, n in zip(many, narrow, strict=False)]

    return apply_impl


def _combine(op: Any, left: list[np.ndarray], right: list[np.ndarray], types: list[Any]) -> list[np.ndarray]:
    """Apply the combining function to two lists of blocks of one shape."""
    tensors = [op.to_tensor(data, type_) for data, type_ in zip([*left, *right], types * 2, strict=True)]
    found = op.combine_fn.fn(*tensors)
    many = found if isinstance(found, tuple) else (found,)
    return [np.asarray(x.handle.data).astype(old.dtype) for x, old in zip(many, left, strict=True)]


def _generic_reduce(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Combine neighbours until one is left: a tree, in order, as a GPU does it."""
    types = [x.dtype for x in inputs]
    shape = inputs[0].handle.data.shape
    blocks = [x.handle.data for x in inputs]
    if self.axis is None:
        blocks = [data.reshape(-1) for data in blocks]
    blocks = [np.moveaxis(data, self.axis or 0, 0) for data in blocks]
    while len(blocks[0]) > 1:  # a power of two, as all of Triton's shapes
        blocks = _combine(self, [data[0::2] for data in blocks], [data[1::2] for data in blocks], types)
    rows = [data[0] for data in blocks]
    if self.keep_dims:
        kept = [1] * len(shape) if self.axis is None else [1 if i == self.axis else n for i, n in enumerate(shape)]
        rows = [data.reshape(kept) for data in rows]
    return [self.to_tensor(data, type_) for data, type_ in zip(rows, types, strict=True)]


def _generic_scan(self: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """Combine slice after slice along the axis."""
    types = [x.dtype for x in inputs]
    blocks = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    slices = [[data[:1] for data in blocks]]
    for i in range(1, len(blocks[0])):
        slices.append(_combine(self, slices[-1], [data[i : i + 1] for data in blocks], types))
    whole = [np.moveaxis(np.concatenate(parts), 0, self.axis) for parts in zip(*slices, strict=True)]
    return [self.to_tensor(np.ascontiguousarray(d), type_) for d, type_ in zip(whole, types, strict=True)]


def install() -> None:
    """Replace the stock implementations in this process."""
    stock.ReduceOps.generic_reduce = _generic_reduce
    stock.ScanOps.generic_scan = _generic_scan
    stock.ReduceOps.apply_impl = _in_float32(stock.ReduceOps.apply_impl)
    stock.ScanOps.apply_impl = _in_float32(stock.ScanOps.apply_impl)
