"""A sparse model as a plain one, and its weights as PyTorch's block-sparse tensors."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mst_compile.api import densify
from mst_compile.blocks.bulk import block_mean_abs
from mst_compile.rules.checks import check_model
from mst_compile.state.sparsifier import parts_of, some_parts_of
from mst_compile.state.weight import SparseWeight


def plain(model: nn.Module) -> nn.Module:
    """A copy of a sparse model, with its zeros, that nothing of us is left on.

    It computes what ``model`` does in eager mode, and pickles, exports (``torch.export``, ONNX) and quantises as the
    model would that was never sparse. ``model`` stays as it is.

    Raises:
        NotSparseError: the model is not sparse.
        ModelError: it is no model.
    """
    check_model("plain", model)
    some_parts_of(model)
    return densify(copy.deepcopy(unwrapped(model)))


def to_bsr(model: nn.Module) -> dict[str, Tensor]:
    """The sparse weights of a model as PyTorch's block-sparse tensors (``torch.sparse_bsr``), by name.

    A tensor holds the values of the active blocks alone, copied, in the weight's shape, dtype and device; an active
    block of zeros is held too, and so is a block outside the mask that holds values all the same. BSR knows whole
    blocks only, so a weight whose shape its block does not divide gets the largest block that does.
    Stacks of matrices in one Parameter, as of experts, are left out: BSR wants as many blocks of each matrix.
    ``model.state_dict() | to_bsr(model)`` is the whole model, and ``to_dense()`` gives back each weight bit for bit.
    What can be multiplied with them is up to PyTorch.

    Raises:
        NotSparseError: the model is not sparse.
        ModelError: it is no model.
    """
    check_model("to_bsr", model)
    some_parts_of(model)
    return {
        name: _bsr(parameter.detach(), weight, active(weight, parameter))
        for name, weight, parameter in weights_of(model)
        if not weight.stacked
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The module within ``torch.compile``'s wrapper."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model


def weights_of(model: nn.Module) -> Iterator[tuple[str, SparseWeight, Tensor]]:
    """Name in the whole model, state and Parameter of each sparse weight."""
    for part in parts_of(model):
        for weight, parameter in part.sparsifier.parameters():
            yield part.full(weight.name), weight, parameter


def active(weight: SparseWeight, parameter: Tensor) -> Tensor:
    """The mask, with blocks that hold values all the same, as those of averages over several topologies do: whoever
    takes what is active gets every value."""
    holding = block_mean_abs((parameter.detach() != 0).float(), weight.grid) > 0
    return weight.mask.to(holding.device) | holding


def _bsr(tensor: Tensor, weight: SparseWeight, mask: Tensor) -> Tensor:
    rows, cols = tensor.shape
    block = math.gcd(weight.grid.block, rows, cols)
    finer = weight.grid.block // block
    mask = mask.repeat_interleave(finer, 0).repeat_interleave(finer, 1)[: rows // block, : cols // block]
    values = tensor.view(rows // block, block, cols // block, block).transpose(1, 2)[mask]
    ptr = torch.cat([mask.new_zeros(1, dtype=torch.int64), mask.sum(1).cumsum(0)])
    return torch.sparse_bsr_tensor(ptr, mask.nonzero()[:, 1], values, tensor.shape, check_invariants=True)
