"""Products with tensor-parallel weights: every rank multiplies what it holds of input and weight.

In Dynamo's graph such a product is a linear layer of DTensors. PyTorch has chosen the layout of its result, by layouts
alone, never by values; along each dimension of the mesh it is one of four (:class:`Along`) if no rank needs more of
input and weight than it holds. Then the layer is ``mst::linear`` of the local tensors between ``to_local`` and
``from_local``, which say how gradients are laid out; AOTAutograd makes collectives of what is around it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch._prims_common import make_contiguous_strides_for

from mst_compile.blocks.shards import is_sharded

if TYPE_CHECKING or torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard


class Along(enum.IntEnum):
    """What ranks along one dimension of the mesh divide among them."""

    OUTPUTS = 0  # ColwiseParallel
    INPUTS = 1  # RowwiseParallel: their results are partial sums
    TOKENS = 2  # a weight that is whole on each, as under sequence parallelism: gradients are partial sums
    NOTHING = 3


def divisions(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, transposed: bool) -> list[Along] | str:
    """What ranks divide along each dimension of the mesh, or why no rank can multiply what it holds.

    Args:
        x: ``[..., in]``, a DTensor as all of these.
        weight: as stored, ``[out, in]``, or ``[in, out]`` if ``transposed``.
        bias: ``[out]``, or None.
        out: the result that PyTorch has laid out, ``[..., out]``.
    """
    given = [tensor for tensor in (x, weight, bias, out) if tensor is not None]
    if not all(is_sharded(tensor) for tensor in given):
        return "some of its tensors are spread over ranks and some are not"
    if len({tensor.device_mesh for tensor in given}) > 1:  # type: ignore[attr-defined]
        return "its tensors are spread over different meshes"
    placements = [tensor.placements for tensor in (x, weight, out)]  # type: ignore[attr-defined]
    found = [_division(a, b, c, x.dim() - 1, transposed) for a, b, c in zip(*placements, strict=True)]
    if None in found:
        one, other, result = (", ".join(map(str, given)) for given in placements)
        return f"its input is laid out as ({one}), its weight as ({other}), its result as ({result})"
    return found  # type: ignore[return-value]


def _division(x: Placement, weight: Placement, out: Placement, last: int, transposed: bool) -> Along | None:
    outputs, inputs = (1, 0) if transposed else (0, 1)
    if x == Replicate() and weight == Shard(outputs) and out == Shard(last):
        return Along.OUTPUTS
    if x == Shard(last) and weight == Shard(inputs) and out == Partial():
        return Along.INPUTS
    if weight == Replicate() and x == out:
        if x == Replicate():
            return Along.NOTHING
        return Along.TOKENS if type(x) is Shard and x.dim < last else None
    return None


def linear(
    x: DTensor,
    weight: DTensor,
    bias: DTensor | None,
    index: Tensor,
    block: int,
    transposed: bool,
    density: float,
    choose: bool,
    along: Sequence[int],
) -> DTensor:
    """``mst::linear`` of DTensors; ``index`` is that of this rank's part of the weight.

    Args:
        along: what :func:`divisions` has found, as numbers.
    """
    laid_out = [_layouts(Along(a), x.placements[dim], x.dim() - 1, transposed) for dim, a in enumerate(along)]
    out, grad_x, grad_weight, grad_bias = zip(*laid_out, strict=True)
    local_bias = None if bias is None else bias.to_local(grad_placements=grad_bias)
    coordinate = weight.device_mesh.get_coordinate()
    assert coordinate is not None
    if local_bias is not None and any(coordinate[dim] for dim, a in enumerate(along) if a == Along.INPUTS):
        # Results are added up over these ranks: the first one adds the bias. Its gradient is the same on all.
        local_bias = local_bias - local_bias.detach()
    local = torch.ops.mst.linear.default(
        x.to_local(grad_placements=grad_x),
        weight.to_local(grad_placements=grad_weight),
        local_bias,
        index,
        block,
        transposed,
        density,
        choose,
    )
    shape = torch.Size((*x.shape[:-1], weight.shape[1 if transposed else 0]))
    stride = make_contiguous_strides_for(shape)
    return DTensor.from_local(local, weight.device_mesh, out, run_check=False, shape=shape, stride=stride)


def _layouts(along: Along, x: Placement, last: int, transposed: bool) -> tuple[Placement, ...]:
    """Along one dimension of the mesh, the layouts of the result and of the gradients of input, weight and bias."""
    whole, partial = Replicate(), Partial()
    outputs, inputs = (1, 0) if transposed else (0, 1)
    if along == Along.OUTPUTS:
        return Shard(last), partial, Shard(outputs), Shard(0)
    if along == Along.INPUTS:
        return partial, Shard(last), Shard(inputs), whole
    if along == Along.TOKENS:
        return x, x, partial, partial
    return whole, whole, whole, whole
