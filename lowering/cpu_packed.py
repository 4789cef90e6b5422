"""``mst::packed_linear`` on the CPU.

As of ``mst::linear``, compiled code reaches the kernel as an *extern kernel* with an ``out`` argument
(:mod:`mst_compile.lowering.cpu_inductor`), and eager mode runs the same function.
"""

from __future__ import annotations

import torch
from mst_compile.kernels import cpu as kernels
from torch import Tensor
from torch.autograd import profiler

from mst_compile.ops.packed import VERSION, packed_linear_reference
from mst_compile.ops.watching import counters, marked


def why_not(dtype: torch.dtype, block: int, bias_dtype: torch.dtype | None) -> str | None:
    """Why there is no kernel for activations and a bias of these dtypes, or None if there is one."""
    reason = kernels.why_unavailable()
    if reason is not None:
        return f"no kernels: {reason}"
    if not kernels.supports_packed(block, dtype):
        return f"no CPU kernel for packed blocks of {block} in {dtype}"
    if bias_dtype is not None and not kernels.supports_dtype(bias_dtype):
        return f"no CPU kernel for a bias in {bias_dtype}"
    return None


def packed_linear(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, outputs: int, block: int, version: int
) -> Tensor | None:
    """``mst::packed_linear``; None where there is no kernel."""
    if not (x.is_cpu and values.is_cpu and index.is_cpu and (bias is None or bias.is_cpu)):
        return None
    if why_not(x.dtype, block, None if bias is None else bias.dtype) is not None:
        return None
    out = x.new_empty((*x.shape[:-1], outputs))
    _run(x, values, index, bias, block, out)
    return out


def packed_linear_out(x: Tensor, values: Tensor, index: Tensor, *bias: Tensor, block: int, out: Tensor) -> Tensor:
    """The same as compiled code calls it, into ``out``: seen by who watches.

    Such code has made sure of all that :mod:`mst_compile.lowering.cpu_inductor` asks of the operands: ``x`` has two
    dimensions, its features side by side, and the others are contiguous.
    """
    added = bias[0] if bias else None
    if not (profiler._is_profiler_enabled or counters):
        _run_compiled(x, values, index, added, block, out)
        return out
    with marked("packed_linear", (x, values, index, added, out.shape[-1], block), unseen=True):
        _run_compiled(x, values, index, added, block, out)
    return out


def _run_compiled(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, block: int, out: Tensor) -> None:
    if values.dtype != x.dtype:  # as autocast, which casts a weight at every call
        values = values.to(x.dtype)
    try:
        kernels.packed_as_laid_out(x, values, index, bias, block, out)
    except RuntimeError:
        if kernels.available():
            raise
        # The code comes from a cache, of a process that had kernels. To ask before would cost every call.
        out.copy_(packed_linear_reference(x, values, index, bias, out.shape[-1], block, VERSION))


def _run(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, block: int, out: Tensor) -> None:
    if x.dim() != 2:
        x, out = x.reshape(-1, x.shape[-1]), out.view(-1, out.shape[-1])
    if not kernels.has_unit_stride(x):
        x = x.contiguous()
    if values.dtype != x.dtype:  # as autocast, which casts a weight at every call
        values = values.to(x.dtype)
    if bias is not None:
        bias = bias.contiguous()
    kernels.packed(x, values.contiguous(), index.contiguous(), bias, block, out)
