"""The operator ``mst::packed_linear``: a product with a weight of which the active blocks alone are kept.

``y[..., out] = x[..., in] W^T + bias`` in ``x``'s dtype, ``W`` rounded to it where it has another. ``values`` and
``index`` are the packed weight of :mod:`mst_compile.blocks.packed` on a grid of ``block`` over ``[outputs, x.shape[-1]]``.
There is no gradient. The reference is plain PyTorch on the unpacked weight: what runs where there is no kernel.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.packed import unpack
from mst_compile.errors import GradientError

from .library import define

_NAME = "mst::packed_linear"


def packed_linear_reference(
    x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, outputs: int, block: int
) -> Tensor:
    """What the operator computes, by way of the dense weight."""
    weight = unpack(values, index, BlockGrid(outputs, x.shape[-1], block)).to(x.dtype)
    x = x.contiguous()  # PyTorch's bfloat16 product reads past the rows of strided ones on CPUs with AMX
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


define(
    "packed_linear(Tensor x, Tensor values, Tensor index, Tensor? bias, int outputs, int block) -> Tensor",
    packed_linear_reference,
)


@torch.library.register_fake(_NAME)
def _(x: Tensor, values: Tensor, index: Tensor, bias: Tensor | None, outputs: int, block: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def _refuse(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _raise()


def _raise(*_: Any) -> NoReturn:
    raise GradientError(
        "a packed weight is for inference and has no gradients, but an input of its layer requires one: call the model "
        "under torch.no_grad(), or train the model that it was packed from"
    )


torch.library.register_autograd(_NAME, _raise, setup_context=_refuse)
