"""Repairs to Triton's interpreter, applied in the worker before any kernel is loaded.

The interpreter keeps bfloat16 as the uint16 of its bits, because numpy has no such type, and hands those integers to
numpy's arithmetic in almost every place: results are wrong without any error. Found in triton 3.6 to 3.9 by comparison
with torch; each repair says what it is for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from triton.runtime import interpreter as stock

from . import reductions
from .bf16 import bf16_handle, is_bf16, widen

TensorHandle = stock.TensorHandle
Builder = stock.InterpreterBuilder


def tf32(numbers: np.ndarray) -> np.ndarray:
    """Float32 with the 13 low bits cut off.

    Triton's PTX for sm_90 passes fp32 operands to the tensor core without `cvt.rna.tf32` (seen in the PTX of triton
    3.9), so the low bits are dropped, not rounded; of the two, dropping makes the larger error.
    """
    single = np.ascontiguousarray(numbers, dtype=np.float32)
    return (single.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


# -- arithmetic --------------------------------------------------------------------------------------------------------


def _repair_dot(round_tf32: bool) -> None:
    """The stock dot multiplies bfloat16's bits as integers; and numpy is slow for halves, having no BLAS for them."""
    original = Builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        kinds = {a.dtype.scalar, b.dtype.scalar}
        if kinds <= {tl.bfloat16, tl.float16} and not is_bf16(d) and d.data.dtype == np.float32:
            product = np.matmul(widen(a).astype(np.float32), widen(b).astype(np.float32))
        elif round_tf32 and kinds == {tl.float32} and input_precision == stock._ir.INPUT_PRECISION.TF32:
            product = np.matmul(tf32(a.data), tf32(b.data))
        elif tl.bfloat16 in kinds or is_bf16(d):
            product = np.matmul(widen(a), widen(b), dtype=np.float32)
            if is_bf16(d):
                return bf16_handle(product + widen(d))
        else:
            return original(self, a, b, d, input_precision, max_num_imprecise_acc)
        return TensorHandle(product + d.data, d.dtype.scalar)

    Builder.create_dot = create_dot


def _repair_casts() -> None:
    """Stock casts of float32 to bfloat16 truncate, and casts between bfloat16 and any other type convert its bits."""
    original = Builder.cast_impl
    original_fp = Builder.create_fp_to_fp

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if dst_type.scalar == tl.bfloat16:
            return bf16_handle(widen(src))
        if is_bf16(src):
            return TensorHandle(widen(src).astype(stock._get_np_dtype(dst_type)), dst_type.scalar)
        return original(self, src, dst_type)

    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        # The stock rounding to nearest takes ties away from zero and loses the carry into the exponent.
        nearest = rounding_mode in (None, stock._ir.ROUNDING_MODE.RTNE)
        plain = {tl.bfloat16, tl.float16, tl.float32, tl.float64}
        if nearest and {src.dtype.scalar, dst_type.scalar} <= plain:
            return cast_impl(self, src, dst_type)
        return original_fp(self, src, dst_type, rounding_mode)

    Builder.cast_impl = cast_impl
    Builder.create_fp_to_fp = create_fp_to_fp
    # Constants; absent up to triton 3.8.
    Builder.get_bf16 = lambda self, value: bf16_handle(np.array([value], dtype=np.float32))


def _result(handle_is_bf16: bool, numbers: np.ndarray, fallback: Any) -> Any:
    if numbers.dtype == np.bool_:
        return TensorHandle(numbers, tl.int1)
    return bf16_handle(numbers) if handle_is_bf16 else TensorHandle(numbers, fallback)


def _repair_elementwise() -> None:
    """Stock arithmetic, comparisons, minima, clamps and fused multiply-adds of bfloat16 work on its bits."""
    binary, unary, fma = Builder.binary_op, Builder.unary_op, Builder.create_fma
    clamp = Builder.create_clampf

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Callable[..., Any]) -> Any:
        if not is_bf16(lhs):
            return binary(self, lhs, rhs, op)
        return _result(True, op(widen(lhs), widen(rhs)), None)

    def unary_op(self: Any, arg: Any, op: Callable[..., Any]) -> Any:
        return bf16_handle(op(widen(arg))) if is_bf16(arg) else unary(self, arg, op)

    def create_fma(self: Any, x: Any, y: Any, z: Any) -> Any:
        if not is_bf16(z):
            return fma(self, x, y, z)
        return bf16_handle(widen(x).astype(np.float64) * widen(y) + widen(z))

    def create_clampf(self: Any, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        if not is_bf16(arg):
            return clamp(self, arg, lo, hi, propagate_nans)
        wide = [TensorHandle(widen(h), tl.float32) for h in (arg, lo, hi)]
        return bf16_handle(clamp(self, *wide, propagate_nans).data)

    Builder.binary_op, Builder.unary_op = binary_op, unary_op
    Builder.create_fma, Builder.create_clampf = create_fma, create_clampf


# -- memory and scalars ------------------------------------------------------------------------------------------------


def _repair_masks() -> None:
    """`block_mask & scalar_bool` gives a mask of a type that the memory operations refuse (triton 3.9), and atomics get
    masks of one column for pointers of many, of which they then serve the first (triton 3.8)."""
    for name, position in (("create_masked_load", 1), ("create_masked_store", 2), ("create_atomic_rmw", 3)):
        setattr(Builder, name, _with_bool_mask(getattr(Builder, name), position))


def _with_bool_mask(original: Callable[..., Any], position: int) -> Callable[..., Any]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask = args[position] if len(args) > position else None
        if isinstance(mask, TensorHandle):
            pointers = next(a for a in args if isinstance(a, TensorHandle))
            whole = np.broadcast_to(mask.data.astype(bool), pointers.data.shape)
            mask = TensorHandle(np.ascontiguousarray(whole), tl.int1)
            args = (*args[:position], mask, *args[position + 1 :])
        return original(self, *args, **kwargs)

    return call


def _refuse_bf16_atomics() -> None:
    """The stock atomic addition would add bits; better no answer than that one."""
    original = Builder.create_atomic_rmw

    def create_atomic_rmw(self: Any, rmw: Any, ptr: Any, val: Any, *args: Any, **kwargs: Any) -> Any:
        if is_bf16(val) and rmw == stock._ir.ATOMIC_OP.FADD:
            raise NotImplementedError("atomic addition of bfloat16 in the interpreter")
        return original(self, rmw, ptr, val, *args, **kwargs)

    Builder.create_atomic_rmw = create_atomic_rmw


def _repair_scalars() -> None:
    """`range(loaded, loaded)` fails with triton 3.6 and numpy 2.4: int() of a one-element array is an error there."""
    original = stock._patch_lang_tensor

    def as_bool(self: Any) -> bool:
        data = np.asarray(self.handle.data)
        return bool(data.reshape(-1)[0]) if data.size == 1 else True

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))
        scope.set_attr(tensor, "__bool__", as_bool)

    stock._patch_lang_tensor = patch_lang_tensor


# -- libdevice ---------------------------------------------------------------------------------------------------------


class TorchLibdevice:
    """CUDA's libdevice by torch: under the interpreter its functions are empty and return None."""

    _OTHER_NAMES = {"rint": "round", "nearbyint": "round", "fabs": "abs", "llrint": "round", "div_rn": "div"}  # noqa: RUF012

    def __getattr__(self, name: str) -> Callable[..., Any]:
        op = getattr(torch, self._OTHER_NAMES.get(name, name), None)
        if op is None or not callable(op):
            raise AttributeError(f"libdevice.{name} has no stand-in in the interpreter")

        def call(*args: Any) -> Any:
            handles = [x.handle for x in args if hasattr(x, "handle")]
            if any(is_bf16(h) for h in handles):
                raise TypeError(f"libdevice.{name} takes no bfloat16")
            values = [torch.from_numpy(np.array(x.handle.data)) if hasattr(x, "handle") else x for x in args]
            numbers = op(*values).numpy()
            first = handles[0].dtype.scalar
            dtype = {"llrint": tl.int64}.get(name, tl.int1 if numbers.dtype == np.bool_ else first)
            handle = TensorHandle(numbers.astype(stock._get_np_dtype(dtype)), dtype)
            block = any(x.type.is_block() for x in args if hasattr(x, "handle"))
            return tl.tensor(handle, tl.block_type(dtype, list(numbers.shape)) if block else dtype)

        return call


def install(*, tf32: bool) -> None:
    """Apply every repair to this process, once, before kernels are loaded.

    Args:
        tf32: Cut the operands of float32 products that ask for tf32 down to it.
    """
    _repair_casts()
    _repair_elementwise()
    _repair_dot(tf32)
    reductions.install()
    _repair_masks()
    _refuse_bf16_atomics()
    _repair_scalars()
    triton_helpers.libdevice = TorchLibdevice()
