"""Which operands have kernels of our own, on which device."""

from __future__ import annotations

import functools
import importlib.util

import torch
from mst_compile.kernels import cpu as kernels

from mst_compile.blocks.grid import TILE_BLOCK

from . import cpu

_GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MIN_HEAD, _MAX_HEAD, _MAX_HEAD_FLOAT32 = 16, 256, 128  # accumulators of larger ones do not fit the registers
_MIN_CAPABILITY = (8, 0)  # bfloat16 and asynchronous copies


def why_unsupported(device: str, x_dtype: torch.dtype, weight_dtype: torch.dtype, block: int) -> str | None:
    """Why there is no own kernel for these operands on a ``device`` type, or None if there is one."""
    if device == "cpu":
        return cpu.why_unsupported(x_dtype, weight_dtype, block)
    if device == "cuda":
        return _why_unsupported_gpu(x_dtype, weight_dtype, block)
    return f"no kernel for device {device}"


def _why_unsupported_gpu(x_dtype: torch.dtype, weight_dtype: torch.dtype, block: int) -> str | None:
    reason = _why_no_gpu_kernels()
    if reason is not None:
        return f"no kernels: {reason}"
    if x_dtype not in _GPU_DTYPES or weight_dtype not in _GPU_DTYPES:
        return f"no GPU kernel for input {x_dtype}, weight {weight_dtype}"
    if block < TILE_BLOCK:
        return f"no GPU kernel for block {block}: the finest is {TILE_BLOCK}"
    return None


def why_no_attention(device: str, dtype: torch.dtype, size: int) -> str | None:
    """Why there is no own attention kernel for heads of ``size`` in ``dtype`` on a ``device`` type, or None."""
    if device == "cpu":
        reason = kernels.why_unavailable()
        if reason is not None:
            return f"no kernels: {reason}"
        fits = kernels.supports_head(dtype, size)
        return None if fits else f"no CPU attention kernel for heads of {size} in {dtype}"
    if device != "cuda":
        return f"no attention kernel for device {device}"
    reason = _why_no_gpu_kernels()
    if reason is not None:
        return f"no kernels: {reason}"
    largest = _MAX_HEAD_FLOAT32 if dtype == torch.float32 else _MAX_HEAD
    if dtype not in _GPU_DTYPES or not _MIN_HEAD <= size <= largest:
        return f"no GPU attention kernel for heads of {size} in {dtype}"
    return None


@functools.cache
def _why_no_gpu_kernels() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.hip is not None:
        return "the GPU kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability()
    if capability < _MIN_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {_MIN_CAPABILITY[0]}.{_MIN_CAPABILITY[1]}"
    return None
