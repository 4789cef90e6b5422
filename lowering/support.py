"""Which operands have kernels of our own, on which device."""

from __future__ import annotations

import functools
import importlib.util

import torch

from mst_compile.blockindex import TILE_BLOCK

from . import cpu

_GPU_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
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
