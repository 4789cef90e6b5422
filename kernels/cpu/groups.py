"""Products with the matrices of a stack as one call, see ``groups.cpp``.

A group is a matrix of the stack, the first of its rows of tokens, and the row behind the last. Small groups are shared
out among the threads, large ones are computed by all of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from . import abi
from .library import Library, code_of, has_unit_stride, index_length, loaded, pointer

Group = tuple[int, int, int]
_SPMM, _GRAD_WEIGHT, _GROUPS = (abi.packer(struct).pack for struct in (abi.Spmm, abi.GradWeight, abi.SpmmGroups))


def spmm_groups(
    x2d: Tensor,
    stack: Tensor,
    index: Tensor,
    groups: Sequence[Group],
    block: int,
    outputs_are_rows: bool,
    out: Tensor,
    library: Library | None = None,
) -> None:
    """What :func:`.library.spmm` does, for each group of rows of ``x2d`` with its matrix of the stack.

    ``stack`` ``[matrices, rows, cols]`` and ``index`` ``[matrices, length]`` are contiguous. Groups must not share rows; rows of ``out`` that are
    in none are left alone. Raises ValueError if a shape, stride, dtype or group does not fit.
    """
    matrices, rows, cols = stack.shape
    outputs, reduction = (rows, cols) if outputs_are_rows else (cols, rows)
    if not (has_unit_stride(x2d) and has_unit_stride(out) and stack.is_contiguous()):
        raise ValueError("spmm_groups: x and out must be contiguous along their last dimension, and the stack whole")
    if x2d.shape[1] != reduction or out.shape != (x2d.shape[0], outputs) or out.dtype != x2d.dtype:
        raise ValueError(
            f"spmm_groups: x {tuple(x2d.shape)} {x2d.dtype} and matrices {rows} x {cols} do not give out "
            f"{tuple(out.shape)} {out.dtype} with outputs_are_rows={outputs_are_rows}"
        )
    _check(index, groups, (matrices, index_length(rows, cols, block)), x2d.shape[0])
    size, ldx, ldy = x2d.element_size(), x2d.stride(0), out.stride(0)
    x, w, i, y = map(pointer, (x2d, stack, index, out))
    of_matrix, of_index = rows * cols * stack.element_size(), 4 * index.shape[1]
    rest = code_of(x2d), code_of(stack), 0, block, outputs_are_rows, 1
    calls = [
        _SPMM(
            x + start * ldx * size, ldx, w + e * of_matrix, cols, rows, cols, i + e * of_index, 0,
            y + start * ldy * size, ldy, end - start, *rest,
        )
        for e, start, end in groups
    ]  # fmt: skip
    _run("mst_spmm_groups", calls, library)


def grad_weight_groups(
    a2d: Tensor,
    b2d: Tensor,
    index: Tensor,
    groups: Sequence[Group],
    block: int,
    out: Tensor,
    library: Library | None = None,
) -> None:
    """What :func:`.library.grad_weight` does, for each group of rows of ``a2d`` and ``b2d`` into its matrix of ``out``
    ``[matrices, rows, cols]``.

    ``out`` and ``index`` ``[matrices, length]`` are contiguous. A group without rows gives zeros; matrices of no group
    are left alone. Raises ValueError if a shape, stride, dtype or group does not fit.
    """
    matrices, rows, cols = out.shape
    if not (has_unit_stride(a2d) and has_unit_stride(b2d) and out.is_contiguous()):
        raise ValueError(
            "grad_weight_groups: a and b must be contiguous along their last dimension, and the stack out whole"
        )
    m = a2d.shape[0]
    if a2d.shape[1] != rows or b2d.shape != (m, cols) or a2d.dtype != b2d.dtype:
        raise ValueError(
            f"grad_weight_groups: a {tuple(a2d.shape)} {a2d.dtype} and b {tuple(b2d.shape)} {b2d.dtype} do not give "
            f"matrices {rows} x {cols}"
        )
    _check(index, groups, (matrices, index_length(rows, cols, block)), m)
    size, lda, ldb = a2d.element_size(), a2d.stride(0), b2d.stride(0)
    a, b, i, o = map(pointer, (a2d, b2d, index, out))
    of_matrix, of_index = rows * cols * out.element_size(), 4 * index.shape[1]
    rest = 0, code_of(a2d), code_of(out), block, 0, 1
    calls = [
        _GRAD_WEIGHT(
            a + start * lda * size, lda, b + start * ldb * size, ldb, end - start, rows, cols, i + e * of_index,
            o + e * of_matrix, cols, *rest,
        )
        for e, start, end in groups
    ]  # fmt: skip
    _run("mst_grad_weight_groups", calls, library)


def _check(index: Tensor, groups: Sequence[Group], shape: tuple[int, int], tokens: int) -> None:
    if index.dtype != torch.int32 or index.shape != shape or not index.is_contiguous():
        raise ValueError(
            f"the index of the stack must be contiguous int32 {shape}, not {index.dtype} {tuple(index.shape)}"
        )
    if not all(0 <= e < shape[0] and 0 <= start <= end <= tokens for e, start, end in groups):
        raise ValueError(f"groups {list(groups)} are not all of {shape[0]} matrices and {tokens} rows of tokens")


def _run(function: str, calls: Sequence[bytes], library: Library | None) -> None:
    """Runs a function of many products on their structs."""
    products = ctypes.create_string_buffer(b"".join(calls))
    arguments = _GROUPS(ctypes.addressof(products), len(calls), torch.get_num_threads())
    (library or loaded()).call(function, arguments)
