"""The kernels as functions on tensors. See ``abi.h`` for what each one computes and how the index is laid out.

The packed index (int32, contiguous) of a weight ``[rows, cols]`` under ``R x C`` blocks starts with 8 header numbers,
followed by ``row_ptr[R + 1]``, ``col_idx[R * C]``, ``col_ptr[C + 1]``, ``row_idx[R * C]``: CSR order, then CSC.
"""

from __future__ import annotations

import ctypes
import functools
import threading

import torch
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid

from . import build

BLOCKS = (4, 8, 16, 32, 64)
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_ERRORS = {-1: "unsupported block size", -2: "unsupported dtypes", -3: "out of memory", -4: "unsupported shape"}

_I, _L, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
_SIGNATURES = {
    "mst_spmm": (_I, _I, _I, _P, _L, _P, _L, _L, _L, _P, _I, _P, _I, _P, _L, _L, _I),
    "mst_grad_weight": (_I, _I, _I, _P, _L, _P, _L, _L, _L, _L, _P, _P, _L, _P, _I, _I),
    "mst_zero_inactive": (_I, _I, _P, _L, _L, _L, _P, _I),
    "mst_block_sumsq": (_I, _I, _P, _L, _L, _L, _P, _I),
    "mst_attention": (_P,),
    "mst_attention_backward": (_P,),
}


class Library:
    """One compiled library; ``isa`` None means the best for this machine."""

    def __init__(self, isa: str | None = None) -> None:
        self._dll = ctypes.CDLL(str(build.build(isa)))
        for name, arguments in _SIGNATURES.items():
            function = getattr(self._dll, name)
            function.argtypes, function.restype = arguments, _I
            setattr(self, name.removeprefix("mst_") + "_raw", function)

    def spmm(
        self,
        x2d: Tensor,
        w: Tensor,
        bias: Tensor | None,
        index: Tensor,
        block: int,
        outputs_are_rows: bool,
        out: Tensor,
    ) -> None:
        rows, cols = w.shape
        m, ldx = x2d.shape[0], x2d.stride(0)
        outputs, reduction = (rows, cols) if outputs_are_rows else (cols, rows)
        if x2d.stride(1) != 1 and reduction > 1:
            raise ValueError("spmm: x must be contiguous along its last dimension")
        if not w.is_contiguous():
            raise ValueError("spmm: the weight must be contiguous")
        if out.stride(1) != 1 and outputs > 1:
            raise ValueError("spmm: out must be contiguous along its last dimension")
        if x2d.shape[1] != reduction or out.shape != (m, outputs) or out.dtype != x2d.dtype:
            raise ValueError(
                f"spmm: x {tuple(x2d.shape)} {x2d.dtype} and weight {tuple(w.shape)} do not give out "
                f"{tuple(out.shape)} {out.dtype} with outputs_are_rows={outputs_are_rows}"
            )
        _check_index(index, rows, cols, block)
        bias_at, bias_dtype = None, 0
        if bias is not None:
            if bias.shape != (outputs,) or not bias.is_contiguous():
                raise ValueError(f"spmm: bias must be contiguous with {outputs} elements")
            bias_at, bias_dtype = bias.data_ptr(), _dtype(bias)
        _check(
            self.spmm_raw(  # type: ignore[attr-defined]
                _dtype(x2d), _dtype(w), block, x2d.data_ptr(), ldx, w.data_ptr(), cols, rows, cols, index.data_ptr(),
                outputs_are_rows, bias_at, bias_dtype, out.data_ptr(), out.stride(0), m, torch.get_num_threads(),
            )
        )  # fmt: skip

    def grad_weight(
        self,
        a2d: Tensor,
        b2d: Tensor,
        index: Tensor,
        block: int,
        out: Tensor,
        colsum: Tensor | None = None,
        colsum_of_a: bool = False,
    ) -> None:
        m, rows = a2d.shape
        cols = b2d.shape[1]
        if (a2d.stride(1) != 1 and rows > 1) or (b2d.stride(1) != 1 and cols > 1) or (out.stride(1) != 1 and cols > 1):
            raise ValueError("grad_weight: a, b and out must be contiguous along their last dimension")
        if b2d.shape[0] != m or out.shape != (rows, cols) or a2d.dtype != b2d.dtype:
            raise ValueError(
                f"grad_weight: a {tuple(a2d.shape)} {a2d.dtype} and b {tuple(b2d.shape)} {b2d.dtype} do not give out "
                f"{tuple(out.shape)}"
            )
        _check_index(index, rows, cols, block)
        colsum_at = None
        if colsum is not None:
            length = rows if colsum_of_a else cols
            if colsum.shape != (length,) or colsum.dtype != torch.float32 or not colsum.is_contiguous():
                raise ValueError(f"grad_weight: colsum must be contiguous float32 with {length} elements")
            colsum_at = colsum.data_ptr()
        _check(
            self.grad_weight_raw(  # type: ignore[attr-defined]
                _dtype(a2d), _dtype(out), block, a2d.data_ptr(), a2d.stride(0), b2d.data_ptr(), b2d.stride(0), m, rows,
                cols, index.data_ptr(), out.data_ptr(), out.stride(0), colsum_at, colsum_of_a, torch.get_num_threads(),
            )
        )  # fmt: skip

    def zero_inactive_(self, w: Tensor, index: Tensor, block: int) -> None:
        rows, cols = w.shape
        if w.stride(1) != 1 and cols > 1:
            raise ValueError("zero_inactive_: the weight must be contiguous along its last dimension")
        _check_index(index, rows, cols, block)
        _check(
            self.zero_inactive_raw(  # type: ignore[attr-defined]
                w.element_size(),
                block,
                w.data_ptr(),
                w.stride(0),
                rows,
                cols,
                index.data_ptr(),
                torch.get_num_threads(),
            )
        )

    def block_sumsq(self, w: Tensor, block: int) -> Tensor:
        rows, cols = w.shape
        if w.stride(1) != 1 and cols > 1:
            raise ValueError("block_sumsq: the weight must be contiguous along its last dimension")
        out = torch.empty(-(-rows // block), -(-cols // block), dtype=torch.float32)
        _check(
            self.block_sumsq_raw(  # type: ignore[attr-defined]
                _dtype(w), block, w.data_ptr(), w.stride(0), rows, cols, out.data_ptr(), torch.get_num_threads()
            )
        )
        return out


def _dtype(tensor: Tensor) -> int:
    code = _DTYPES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"CPU kernels take float32 and bfloat16, not {tensor.dtype}")
    return code


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"CPU kernel: {_ERRORS.get(status, status)}")


def _check_index(index: Tensor, rows: int, cols: int, block: int) -> None:
    length = BlockGrid(rows, cols, block).index_length
    if index.dtype != torch.int32 or index.numel() != length or not index.is_contiguous():
        raise ValueError(f"the index does not belong to a {rows} x {cols} weight with blocks of {block}")


# ---- the library of this process -------------------------------------------------------------------------------------

_lock = threading.Lock()


@functools.cache
def _load_once() -> Library | str:
    """The library, or why there is none. A failure is remembered: no compiler is tried twice in a process."""
    try:
        return Library()
    except (build.BuildError, OSError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"


def _load() -> Library | str:
    with _lock:
        return _load_once()


@functools.cache
def _library() -> Library:
    loaded = _load()
    if isinstance(loaded, str):
        raise RuntimeError(f"the CPU kernels are not available: {loaded}")
    return loaded


def available() -> bool:
    """Whether the kernels are, or can be, compiled on this machine. The first call compiles them."""
    return not isinstance(_load(), str)


def why_unavailable() -> str | None:
    """Why :func:`available` is False; None if it is True."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def supports(block: int, x_dtype: torch.dtype, w_dtype: torch.dtype) -> bool:
    """Whether the kernels take activations and weights of these dtypes under this block size."""
    same = x_dtype == w_dtype and x_dtype in _DTYPES
    return block in BLOCKS and (same or (x_dtype == torch.bfloat16 and w_dtype == torch.float32))


def source_hash() -> str:
    """Hash of the kernels' sources, for the keys of compile caches."""
    return build.source_hash()


def spmm(
    x2d: Tensor, w: Tensor, bias: Tensor | None, index: Tensor, block: int, outputs_are_rows: bool, out: Tensor
) -> None:
    """Writes ``x2d @ w.T + bias`` (``outputs_are_rows``) or ``x2d @ w + bias`` to ``out``, over active blocks only.

    ``x2d`` is ``[m, cols]`` or ``[m, rows]`` with unit stride along its rows, ``w`` contiguous ``[rows, cols]``,
    ``out`` of ``x2d``'s dtype. float32 or bfloat16; a float32 ``w`` under bfloat16 ``x2d`` is rounded as it is packed.
    Sums are float32. Raises ValueError if a shape, stride or dtype does not fit.
    """
    _library().spmm(x2d, w, bias, index, block, outputs_are_rows, out)


def grad_weight(
    a2d: Tensor,
    b2d: Tensor,
    index: Tensor,
    block: int,
    out: Tensor,
    colsum: Tensor | None = None,
    colsum_of_a: bool = False,
) -> None:
    """Writes ``a2d.T @ b2d`` to the active blocks of ``out`` ``[rows, cols]``, exact zeros elsewhere.

    ``a2d`` ``[m, rows]`` and ``b2d`` ``[m, cols]`` share a dtype; ``out`` is float32 or bfloat16. ``colsum`` (float32)
    receives the column sums of ``b2d``, or of ``a2d`` if ``colsum_of_a``: the gradient of a bias, in the same pass.
    """
    _library().grad_weight(a2d, b2d, index, block, out, colsum, colsum_of_a)


def zero_inactive_(w: Tensor, index: Tensor, block: int) -> None:
    """Sets the inactive blocks of ``w`` ``[rows, cols]`` to zero in place."""
    _library().zero_inactive_(w, index, block)


def block_sumsq(w: Tensor, block: int) -> Tensor:
    """Sum of squares of each block of ``w``: float32 ``[R, C]``."""
    return _library().block_sumsq(w, block)
