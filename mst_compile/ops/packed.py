"""The operator ``mst::packed_linear``: a product with a weight of which the active blocks alone are kept.

``y[..., out] = x[..., in] W^T + bias`` in ``x``'s dtype, ``W`` rounded to it where it has another. ``values`` and
``index`` are the packed weight of :mod:`mst_compile.blocks.packed`, on a grid of ``block`` over
``[outputs, x.shape[-1]]``.
``version`` is :data:`VERSION`, a number in every graph: compiled code comes out of caches of any backend, and shall not
be that of another layout, or of kernels that are called otherwise.

There is no gradient, and no autograd function either, which would double what a call costs: who holds a packed weight
refuses inputs that require one. The reference is plain PyTorch on the unpacked weight: what runs where there is no
kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.packed import unpack

from .library import define

_NAME = "mst::packed_linear"
VERSION = 1  # of the layout of packed weights, and of how compiled code calls kernels for them


def packed_linear_reference(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, outputs: int, block: int, version: int
) -> Tensor:
    """What the operator computes, by way of the dense weight."""
    weight = unpack(values, index, BlockGrid(outputs, x.shape[-1], block)).to(x.dtype)
    x = x.contiguous()  # PyTorch's bfloat16 product reads past the rows of strided ones on CPUs with AMX
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


define(
    "packed_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, int outputs, int block, int version) -> Tensor",
    packed_linear_reference,
)


@torch.library.register_fake(_NAME)
def _(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, outputs: int, block: int, version: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))
