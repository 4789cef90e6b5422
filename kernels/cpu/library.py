"""The kernels as functions on tensors. See ``abi.h`` for what each one computes and how the index is laid out.

The packed index (int32, contiguous) of a weight ``[rows, cols]`` under ``R x C`` blocks starts with 8 header numbers,
followed by ``row_ptr[R + 1]``, ``col_idx[R * C]``, ``col_ptr[C + 1]``, ``row_idx[R * C]``: CSR order, then CSC.
"""

from __future__ import annotations

import ctypes
import functools
import warnings
from pathlib import Path

import torch
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.memory import is_plain
from mst_compile.errors import MSTWarning

from . import abi, build, table
from .forks import Lock, survive_forks
from .private import copy_of

FINEST_BLOCK = min(table.BLOCKS)
# After a product, which sweeps the caches, what Python runs before the next one takes five times as long as when it is
# called again and again: some hundred microseconds, so that the fields of a struct are not assigned one by one.
_SPMM, _PACKED, _GRAD_WEIGHT, _ZERO_INACTIVE = (
    abi.packer(struct).pack for struct in (abi.Spmm, abi.Packed, abi.GradWeight, abi.ZeroInactive)
)


class Library:
    """One compiled library; ``isa`` None means the best for this machine."""

    def __init__(self, isa: str | None = None) -> None:
        self._dll = _open(isa)
        survive_forks(self._dll)

    def call(self, function: str, arguments: ctypes.Structure | bytes) -> None:
        """Runs a function of ``abi.h`` on its struct or the bytes of it; raises RuntimeError if it reports an error."""
        struct = arguments if isinstance(arguments, bytes) else ctypes.byref(arguments)
        status = getattr(self._dll, function)(struct)
        if status:
            raise RuntimeError(f"CPU kernel: {abi.ERRORS.get(status, status)}")

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
        m = x2d.shape[0]
        outputs, reduction = (rows, cols) if outputs_are_rows else (cols, rows)
        if not has_unit_stride(x2d):
            raise ValueError("spmm: x must be contiguous along its last dimension")
        if not has_unit_stride(w):
            raise ValueError("spmm: the weight must be contiguous along its last dimension")
        if not has_unit_stride(out):
            raise ValueError("spmm: out must be contiguous along its last dimension")
        if x2d.shape[1] != reduction or out.shape != (m, outputs) or out.dtype != x2d.dtype:
            raise ValueError(
                f"spmm: x {tuple(x2d.shape)} {x2d.dtype} and weight {tuple(w.shape)} do not give out "
                f"{tuple(out.shape)} {out.dtype} with outputs_are_rows={outputs_are_rows}"
            )
        _check_index(index, rows, cols, block)
        if bias is not None and (bias.shape != (outputs,) or not bias.is_contiguous()):
            raise ValueError(f"spmm: bias must be contiguous with {outputs} elements")
        arguments = _SPMM(
            pointer(x2d),
            x2d.stride(0),
            pointer(w),
            w.stride(0),
            rows,
            cols,
            pointer(index),
            0 if bias is None else pointer(bias),
            pointer(out),
            out.stride(0),
            m,
            code_of(x2d),
            code_of(w),
            0 if bias is None else code_of(bias),
            block,
            outputs_are_rows,
            torch.get_num_threads(),
        )
        self.call("mst_spmm", arguments)

    def packed(self, x2d: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, block: int, out: Tensor) -> None:
        (m, _), (rows, outputs), dtype = x2d.shape, out.shape, x2d.dtype
        if not (has_unit_stride(x2d) and has_unit_stride(out)):
            raise ValueError("packed: x and out must be contiguous along their last dimension")
        if rows != m or values.dtype != dtype or out.dtype != dtype:
            raise ValueError(
                f"packed: x {tuple(x2d.shape)} {dtype} and a weight in {values.dtype} do not give out "
                f"{tuple(out.shape)} {out.dtype}"
            )
        if index.dtype != torch.int32 or not (values.is_contiguous() and index.is_contiguous()):
            raise ValueError(
                f"packed: values {tuple(values.shape)} and index {tuple(index.shape)} {index.dtype} are no packed "
                "weight: both must be contiguous, and the index int32"
            )
        if bias is not None and (bias.shape != (outputs,) or not bias.is_contiguous()):
            raise ValueError(f"packed: bias must be contiguous with {outputs} elements")
        self.packed_as_laid_out(x2d, values, index, bias, block, out)

    def packed_as_laid_out(
        self, x2d: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, block: int, out: Tensor
    ) -> None:
        rows, outputs = out.shape
        blocks = index.numel() - (-(-outputs // block) + 1)
        if blocks < 0 or values.numel() != blocks * block * block:
            raise ValueError(
                f"packed: values {tuple(values.shape)} and index {tuple(index.shape)} are no packed weight of "
                f"{outputs} rows in blocks of {block}"
            )
        dtype = code_of(x2d)
        arguments = _PACKED(
            x2d.data_ptr(),
            x2d.stride(0),
            values.data_ptr(),
            index.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            out.stride(0),
            rows,
            outputs,
            x2d.size(1),
            dtype,
            0 if bias is None else code_of(bias),
            block,
            torch.get_num_threads(),
        )
        self.call("mst_packed", arguments)

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
        if not all(map(has_unit_stride, (a2d, b2d, out))):
            raise ValueError("grad_weight: a, b and out must be contiguous along their last dimension")
        if b2d.shape[0] != m or out.shape != (rows, cols) or a2d.dtype != b2d.dtype:
            raise ValueError(
                f"grad_weight: a {tuple(a2d.shape)} {a2d.dtype} and b {tuple(b2d.shape)} {b2d.dtype} do not give out "
                f"{tuple(out.shape)}"
            )
        _check_index(index, rows, cols, block)
        if colsum is not None:
            length = rows if colsum_of_a else cols
            if colsum.shape != (length,) or colsum.dtype != torch.float32 or not colsum.is_contiguous():
                raise ValueError(f"grad_weight: colsum must be contiguous float32 with {length} elements")
        arguments = _GRAD_WEIGHT(
            pointer(a2d),
            a2d.stride(0),
            pointer(b2d),
            b2d.stride(0),
            m,
            rows,
            cols,
            pointer(index),
            pointer(out),
            out.stride(0),
            0 if colsum is None else pointer(colsum),
            code_of(a2d),
            code_of(out),
            block,
            colsum_of_a,
            torch.get_num_threads(),
        )
        self.call("mst_grad_weight", arguments)

    def zero_inactive_(self, w: Tensor, index: Tensor, block: int) -> None:
        rows, cols = w.shape
        if not has_unit_stride(w):
            raise ValueError("zero_inactive_: the weight must be contiguous along its last dimension")
        _check_index(index, rows, cols, block)
        arguments = _ZERO_INACTIVE(
            pointer(w),
            w.stride(0),
            rows,
            cols,
            pointer(index),
            w.element_size(),
            block,
            torch.get_num_threads(),
        )
        self.call("mst_zero_inactive", arguments)

    def block_sumsq(self, w: Tensor, block: int) -> Tensor:
        rows, cols = w.shape
        if not has_unit_stride(w):
            raise ValueError("block_sumsq: the weight must be contiguous along its last dimension")
        out = torch.empty(-(-rows // block), -(-cols // block), dtype=torch.float32, device="cpu")
        arguments = abi.BlockSumsq(
            w=pointer(w),
            ldw=w.stride(0),
            rows=rows,
            cols=cols,
            out=pointer(out),
            dtype=code_of(w),
            block=block,
            threads=torch.get_num_threads(),
        )
        self.call("mst_block_sumsq", arguments)
        return out


def _open(isa: str | None) -> ctypes.CDLL:
    """Load the library. One that came out of the cache and does not load, as it was built where other system libraries
    are, or has just been replaced, is built once more."""
    path = build.build(isa)
    try:
        return _open_file(path)
    except OSError:
        if path in build.made:
            raise
    return _open_file(build.build(isa, rejected=path))


def _open_file(path: Path) -> ctypes.CDLL:
    """Load a library, or a copy of it where nothing in its folder can be run, as on a disk that is mounted so."""
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        found = _open_copy(path, error)
        if found is None:
            raise
        return found


def _open_copy(path: Path, error: OSError) -> ctypes.CDLL | None:
    """Load a copy that is this process's alone; None where that does not load either."""
    try:
        found = ctypes.CDLL(str(copy_of(path)))
    except OSError:
        return None
    warnings.warn(
        f"the compiled kernels cannot be loaded from {path.parent} ({str(error).removeprefix(f'{path}: ')}), as on a "
        "disk that is mounted noexec: this process has loaded a copy. Set MST_COMPILE_CACHE_DIR to a folder from which "
        "libraries can be loaded",
        MSTWarning,
        stacklevel=2,
    )
    return found


def has_unit_stride(tensor: Tensor) -> bool:
    """Whether elements lie side by side along the last dimension, or there are none that could not."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1 or tensor.numel() == 0


def pointer(tensor: Tensor) -> int:
    """Address of the first element; raises ValueError if the values are not in this process's memory."""
    if not (tensor.is_cpu and is_plain(tensor)):
        raise ValueError(f"CPU kernels take plain tensors on the CPU, not {type(tensor).__name__} on {tensor.device}")
    return tensor.data_ptr()


def number_at(index: Tensor, at: int) -> int:
    """A number of a packed index; raises ValueError if its values are not in this process's memory.

    Asked of PyTorch, which makes a tensor of it first, it would take a third of what a call costs beside its kernel.
    """
    return ctypes.c_int32.from_address(pointer(index) + 4 * at * index.stride(0)).value


def code_of(tensor: Tensor) -> int:
    """What a tensor's dtype is called in ``abi.h``; raises ValueError if there are no kernels for it."""
    code = table.CODES.get(tensor.dtype)
    if code is None:
        raise ValueError(f"CPU kernels take {table.dtype_names()}, not {tensor.dtype}")
    return code


@functools.lru_cache(maxsize=1024)  # a product of few tokens takes not much longer than this
def index_length(rows: int, cols: int, block: int) -> int:
    """Length of the packed index of such a weight."""
    return BlockGrid(rows, cols, block).index_length


def _check_index(index: Tensor, rows: int, cols: int, block: int) -> None:
    length = index_length(rows, cols, block)
    if index.dtype != torch.int32 or index.numel() != length or not index.is_contiguous():
        raise ValueError(f"the index does not belong to a {rows} x {cols} weight with blocks of {block}")


# ---- the library of this process -------------------------------------------------------------------------------------

_lock = Lock()


@functools.cache
def _load_once() -> Library | str:
    """The library, or why there is none. A failure is remembered: no compiler is tried twice in a process."""
    try:
        return Library()
    except (build.BuildError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def _load() -> Library | str:
    with _lock:
        return _load_once()


@functools.cache
def loaded() -> Library:
    """The library of this process; raises RuntimeError if there is none."""
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(f"the CPU kernels are not available: {library}")
    return library


def available() -> bool:
    """Whether the kernels are, or can be, compiled on this machine. The first call compiles them."""
    return not isinstance(_load(), str)


def why_unavailable() -> str | None:
    """Why :func:`available` is False; None if it is True."""
    library = _load()
    return library if isinstance(library, str) else None


def supports(block: int, x_dtype: torch.dtype, w_dtype: torch.dtype) -> bool:
    """Whether the kernels take activations and weights of these dtypes under this block size."""
    return block in table.BLOCKS and (x_dtype, w_dtype) in table.PRODUCTS


def supports_packed(block: int, dtype: torch.dtype) -> bool:
    """Whether the kernel for packed weights takes activations of this dtype under this block size."""
    return dtype in table.CODES and block in (*table.BLOCKS, 2 * max(table.BLOCKS))


def supports_dtype(dtype: torch.dtype) -> bool:
    """Whether the kernels take a bias of this dtype."""
    return dtype in table.CODES


def source_hash() -> str:
    """Hash of the kernels' sources, for the keys of compile caches."""
    return build.source_hash()


def spmm(
    x2d: Tensor, w: Tensor, bias: Tensor | None, index: Tensor, block: int, outputs_are_rows: bool, out: Tensor
) -> None:
    """Writes ``x2d @ w.T + bias`` (``outputs_are_rows``) or ``x2d @ w + bias`` to ``out``, over active blocks only.

    ``x2d`` is ``[m, cols]`` or ``[m, rows]`` and ``w`` ``[rows, cols]`` with unit stride along their rows, ``out`` of
    ``x2d``'s dtype. Dtypes are those of ``table.PRODUCTS``; a ``w`` of another dtype than ``x2d`` is rounded to it as
    it is packed. Sums are float32. Raises ValueError if a shape, stride or dtype does not fit.
    """
    loaded().spmm(x2d, w, bias, index, block, outputs_are_rows, out)


def packed(x2d: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, block: int, out: Tensor) -> None:
    """Writes ``x2d @ W.T + bias`` to ``out`` ``[m, outputs]``, for a packed ``W`` (:mod:`mst_compile.blocks.packed`).

    ``x2d``, ``values`` and ``out`` have one dtype of ``table.DTYPES``; sums are float32. Raises ValueError if a shape,
    stride or dtype does not fit. Two things are not looked at, since a product of one token takes not much longer
    than that: the tensors must be plain ones on the CPU, and the columns in ``index`` those of such a weight.
    """
    loaded().packed(x2d, values, index, bias, block, out)


def packed_as_laid_out(
    x2d: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, block: int, out: Tensor
) -> None:
    """:func:`packed` of operands whose dtypes and strides are known to fit: from code that was compiled for them.

    What is asked of one tensor costs 50 to 100 nanoseconds, more where the weights of a model have swept the cache, and
    a product of one token takes some 30 microseconds. Raises ValueError if there are more or fewer values than blocks.
    """
    loaded().packed_as_laid_out(x2d, values, index, bias, block, out)


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

    ``a2d`` ``[m, rows]`` and ``b2d`` ``[m, cols]`` share a dtype; dtypes are those of ``table.GRADIENTS``. ``colsum``
    (float32) receives the column sums of ``b2d``, or of ``a2d`` if ``colsum_of_a``: the gradient of a bias, in the same
    pass.
    """
    loaded().grad_weight(a2d, b2d, index, block, out, colsum, colsum_of_a)


def zero_inactive_(w: Tensor, index: Tensor, block: int) -> None:
    """Sets the inactive blocks of ``w`` ``[rows, cols]`` to zero in place."""
    loaded().zero_inactive_(w, index, block)


def block_sumsq(w: Tensor, block: int) -> Tensor:
    """Sum of squares of each block of ``w``: float32 ``[R, C]``."""
    return loaded().block_sumsq(w, block)
