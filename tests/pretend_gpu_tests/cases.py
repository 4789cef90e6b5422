"""Functions to write code for, and kernels written by hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TRITON_MM = {"max_autotune": True, "max_autotune_gemm_backends": "TRITON"}

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def mm_bias_gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(x @ w.t() + b)


def operands(m: int, n: int, k: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((m, k), (n, k), (n,))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


KERNEL = """
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers, triton_heuristics
from torch._inductor.runtime.triton_helpers import libdevice

@triton_heuristics.template(
    num_stages=1,
    num_warps=4,
    triton_meta={"signature": {}, "constants": {}, "configs": [{}]},
    inductor_meta={"grid_type": "FixedGrid", "fixed_grid": ["x", "y", "z"], "extra_launcher_args": ["x", "y", "z"]},
)
@triton.jit
def kernel(a, b, out):
    i = tl.arange(0, 16)
    square = i[:, None] * 16 + i[None, :]
    BODY
"""

WRAPPER = """
import torch
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels
async_compile = AsyncCompile()
kernel = async_compile.triton('kernel', '''KERNEL''', device_str='cuda')
async_compile.wait(globals())
def call(args):
    a, b, out = args
    args.clear()
    with torch.cuda._DeviceGuard(0):
        kernel.run(a, b, out, 1, 1, 1, stream=0)
    return (out,)
"""


def by_hand(body: str) -> str:
    """A wrapper as Inductor writes it, around a kernel with this body."""
    return WRAPPER.replace("KERNEL", KERNEL.replace("BODY", body.strip().replace("\n", "\n    ")))
