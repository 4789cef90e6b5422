"""Products with tensor-parallel weights: every rank multiplies what it holds of input and weight.

In Dynamo's graph such a product is a linear layer of DTensors. PyTorch has chosen the layout of its result, by layouts
alone, never by values; along each dimension of the mesh it is one of four (:class:`Along`) if no rank needs more of
input and weight than it holds. Then the layer is ``mst::linear`` of the local tensors between ``to_local`` and
``from_local``, which say how gradients are laid out; AOTAutograd makes collectives of what is around it.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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


# ---- stacks of matrices ----------------------------------------------------------------------------------------------


class Layouts(NamedTuple):
    """Along each dimension of the mesh, layouts in a product with a stack of matrices, as numbers: a dimension that is
    sharded, :data:`WHOLE`, or :data:`SUMS`.

    Attributes:
        x, weight: of what a rank multiplies.
        out: of the result.
        grad_x, grad_weight: of gradients.
    """

    x: list[int]
    weight: list[int]
    out: list[int]
    grad_x: list[int]
    grad_weight: list[int]


WHOLE, SUMS = -1, -2


def stack_layouts(
    x: Tensor, weight: Tensor, offsets: Tensor | None, out: Tensor, x_dims: str, out_dims: str
) -> Layouts | str:
    """What ranks multiply of a stack of matrices, or why none can multiply what it holds.

    Args:
        x, weight, offsets, out: DTensors; ``weight`` as stored, ``[E, rows, cols]``.
        x_dims, out_dims: a letter for each dimension of input and result, as :class:`mst_compile.graph.grouped.Match`
            has them.
    """
    given = [tensor for tensor in (x, weight, offsets, out) if tensor is not None]
    if not all(is_sharded(tensor) for tensor in given):
        return "some of its tensors are spread over ranks and some are not"
    if len({tensor.device_mesh for tensor in given}) > 1:  # type: ignore[attr-defined]
        return "its tensors are spread over different meshes"
    entry = x_dims.index("e") if "e" in x_dims and (x.shape[x_dims.index("e")] != 1 or len(weight) == 1) else None
    placements = [tensor.placements for tensor in (x, weight, out)]  # type: ignore[attr-defined]
    found = []
    for a, b, c in zip(*placements, strict=True):
        one = _of_stack(a, b, c, entry, x_dims, out_dims)
        if one is None or (offsets is not None and one[0] != [WHOLE] * 5):
            names = (", ".join(map(str, layout)) for layout in placements)
            return "its input is laid out as ({}), its stack of matrices as ({}), its result as ({})".format(*names)
        found.append(one)
    return Layouts(*map(list, zip(*found, strict=True)))


def _of_stack(
    x: Placement, weight: Placement, out: Placement, entry: int | None, x_dims: str, out_dims: str
) -> tuple[int, int, int, int, int] | None:
    """Along one dimension of the mesh the five of :class:`Layouts`; None where ranks hold what does not fit."""
    if weight == Shard(0) and out == Shard(out_dims.index("e")):
        if entry is None and x == Replicate():
            return WHOLE, 0, out_dims.index("e"), SUMS, 0
        if entry is not None and x in (Replicate(), Shard(entry)):
            return entry, 0, out_dims.index("e"), entry, 0
    if weight == Replicate() and x == Replicate() and out == Replicate():
        return WHOLE, WHOLE, WHOLE, WHOLE, WHOLE
    if weight == Replicate() and type(x) is Shard and type(out) is Shard:
        letter = x_dims[x.dim]
        if letter not in "ek" and letter == out_dims[out.dim]:
            return x.dim, WHOLE, out.dim, x.dim, SUMS
    return None


def _placements(codes: Sequence[int]) -> tuple[Placement, ...]:
    return tuple(Replicate() if c == WHOLE else Partial() if c == SUMS else Shard(c) for c in codes)


def local(tensor: DTensor, layout: Sequence[int], of_gradient: Sequence[int]) -> Tensor:
    """What this rank multiplies of a DTensor: what it holds, or its share of what all hold.

    Args:
        layout: of which it is the local tensor, as in :class:`Layouts`.
        of_gradient: how its gradients are laid out.
    """
    wanted = _placements(layout)
    if tensor.placements == wanted:
        return tensor.to_local(grad_placements=_placements(of_gradient))
    return _Share.apply(tensor, wanted)  # type: ignore[no-any-return]


class _Share(torch.autograd.Function):
    """This rank's share of a DTensor that is whole along some dimensions of the mesh. Its gradient stays shared out, as
    where PyTorch itself cuts an operand: ranks that multiply sparse and ranks that do not need the same collectives."""

    @staticmethod
    def forward(ctx: Any, tensor: DTensor, wanted: tuple[Placement, ...]) -> Tensor:
        ctx.of = tensor.device_mesh, wanted, tensor.shape, tensor.stride()
        share = tensor.redistribute(placements=wanted).to_local()
        return share.view_as(share)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[DTensor, None]:
        mesh, wanted, shape, stride = ctx.of
        strides = make_contiguous_strides_for(shape) if gradient.is_contiguous() else stride
        return DTensor.from_local(gradient, mesh, wanted, run_check=False, shape=shape, stride=strides), None


def joined(
    found: Tensor,
    x: DTensor,
    weight: DTensor,
    layout: Sequence[int],
    x_dims: str,
    out_dims: str,
    stored: str,
    outputs: int,
) -> DTensor:
    """The result of a product with a stack, of which this rank has computed ``found``.

    Args:
        x, weight: what was multiplied.
        stored: the letters of ``out_dims`` in the order in which they lie in memory.
        outputs: the dimension of the stack that results have.
    """
    sizes = {letter: x.shape[i] for i, letter in enumerate(x_dims)} | {"e": weight.shape[0], "n": weight.shape[outputs]}
    lying = make_contiguous_strides_for([sizes[letter] for letter in stored])
    strides = dict(zip(stored, lying, strict=True))
    return DTensor.from_local(
        found,
        weight.device_mesh,
        _placements(layout),
        run_check=False,
        shape=torch.Size([sizes[letter] for letter in out_dims]),
        stride=tuple(strides[letter] for letter in out_dims),
    )
