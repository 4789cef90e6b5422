"""Weights that are spread over ranks: which rows of one live here, and where its other forms are.

``torch.distributed.fsdp.fully_shard`` stores each Parameter as a DTensor that holds some rows on every rank (row
shards may cut through blocks and may be empty), and puts a whole, "unsharded" Parameter in its place while the module
runs. Masks and index are those of the whole weight, the same on every rank. Who shards a Parameter tells by
:func:`remember`; nothing here knows FSDP2.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from mst_compile.errors import ParallelismError

if TYPE_CHECKING or torch.distributed.is_available():
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, Replicate, Shard

    _AVAILABLE = True
else:  # a build of PyTorch without torch.distributed
    _AVAILABLE = False


class Holder(Protocol):
    """What holds a Parameter in both of its forms."""

    @property
    def sharded(self) -> Tensor:
        """The Parameter that optimizers know."""

    @property
    def whole(self) -> Tensor | None:
        """The whole copy of it, if it is in use now."""


# Sharded and unsharded Parameters -> a weak reference to what holds both. Weak, because that keeps the key alive.
_holders: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember(parameter: Tensor, holder: Holder) -> None:
    """Note that ``parameter`` is one of the two forms that ``holder`` keeps of a Parameter."""
    if holder_of(parameter) is not holder:
        _holders[parameter] = weakref.ref(holder)


def holder_of(parameter: Tensor) -> Holder | None:
    """What :func:`remember` noted of ``parameter``, as long as it lives."""
    if not _holders.data:  # without FSDP2 this is asked for every weight at every step: it should cost nothing
        return None
    reference = _holders.get(parameter)
    return None if reference is None else reference()


def is_sharded(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor."""
    return _AVAILABLE and isinstance(tensor, DTensor)


@torch.no_grad()
def local_rows(tensor: Tensor) -> tuple[Tensor, int]:
    """The rows of ``tensor`` that this rank holds.

    Args:
        tensor: ``[rows, cols]``, any dtype; a DTensor that is sharded on dimension 0 by at most one dimension of its
            mesh, as FSDP2's are, or an ordinary tensor.

    Returns:
        The local tensor, ``[n, cols]`` with ``n >= 0``, sharing storage; and the row of ``tensor`` that it begins at.

    Raises:
        ParallelismError: the DTensor is laid out in another way.
    """
    if not is_sharded(tensor):
        return tensor, 0
    assert isinstance(tensor, DTensor)
    dim = _shard_dim(tensor)
    if dim is None:
        raise ParallelismError(f"expected a tensor whose rows are sharded by FSDP2, got placements {tensor.placements}")
    local = tensor.to_local()
    if dim < 0:
        return local, 0
    # Shards are made as torch.chunk makes them: of equal height, the last ones shorter or empty.
    rows, mesh = tensor.shape[0], tensor.device_mesh
    height = -(-rows // mesh.size(dim))
    return local, min(mesh.get_local_rank(dim) * height, rows)


def _shard_dim(tensor: DTensor) -> int | None:
    """The mesh dimension that shards the rows of ``tensor``; -1 if it is whole on every rank, None if neither."""
    found = -1
    for dim, placement in enumerate(tensor.placements):
        # Subclasses of Shard interleave rows: they come from FSDP2 over tensor parallelism.
        if type(placement) is Shard and placement.dim == 0 and found < 0:
            found = dim
        elif not isinstance(placement, Replicate):
            return None
    return found


def sum_over_shards(part: Tensor, tensor: Tensor) -> Tensor:
    """Add up ``part``, computed from the local rows of ``tensor``, over the ranks that hold the other rows.

    Every rank that holds a shard must call it; all get the same sum (``torch.distributed.all_reduce``), in which NaN
    and inf of any rank appear. Ordinary tensors: ``part`` itself.
    """
    if not is_sharded(tensor):
        return part
    assert isinstance(tensor, DTensor)
    dim = _shard_dim(tensor)
    assert dim is not None
    if dim < 0:
        return part
    mesh = tensor.device_mesh
    part = part.to(mesh.device_type)  # shards that are offloaded to the host are summed where the group can
    dist.all_reduce(part, group=mesh.get_group(dim))
    return part


def stored(parameter: Tensor) -> Tensor:
    """What optimizers know ``parameter`` by: FSDP2's sharded Parameter if ``parameter`` stands in for it, else itself.

    A module holds the unsharded Parameter during forward and backward, and the root module also after a forward pass
    without a backward one.
    """
    holder = holder_of(parameter)
    return parameter if holder is None else holder.sharded


def parameter_of(name: str, module: nn.Module, attribute: str) -> nn.Parameter:
    """The Parameter, as optimizers know it, of the weight ``name`` that ``module`` holds as ``attribute``.

    Raises:
        ParallelismError: it is there no more.
    """
    parameter = held_parameter(module, attribute)
    if parameter is None:
        raise _flattened(name, f"gone from its {type(module).__name__}")
    return parameter


def held_parameter(module: nn.Module, attribute: str) -> nn.Parameter | None:
    """The Parameter, as optimizers know it, that ``module`` holds as ``attribute``, also under a parametrization of it;
    None if it is there no more."""
    parameter = module._parameters.get(attribute)
    if parameter is None:
        parametrizations = module._modules.get("parametrizations")
        inside = parametrizations._modules.get(attribute) if parametrizations is not None else None
        parameter = None if inside is None else inside._parameters.get("original")
    return None if parameter is None else stored(parameter)  # type: ignore[return-value]


def _flattened(name: str, what: str) -> ParallelismError:
    return ParallelismError(
        f"the Parameter {name} that was made sparse is {what}. FSDP1 (FullyShardedDataParallel) flattens Parameters "
        "and is not supported: use torch.distributed.fsdp.fully_shard. Apply parametrizations before sparsify"
    )


def unsharded(parameter: Tensor) -> Tensor | None:
    """The whole copy that FSDP2 has gathered of a sharded ``parameter``, if it is in use now: changes of ``parameter``
    must be made in it too, because it is gathered anew only after it has been freed."""
    if not is_sharded(parameter):
        return None
    holder = holder_of(parameter)
    return holder.whole if holder is not None and parameter is holder.sharded else None


def check_placement(name: str, parameter: Tensor) -> None:
    """Raise :class:`ParallelismError` unless ``parameter`` can be trained sparse: it is an ordinary tensor, or sharded
    by FSDP2 on dimension 0 (a replicated second mesh dimension, HSDP, included).

    Args:
        name: of the weight, for the message.
        parameter: of any dtype, ``[rows, cols]``.
    """
    if parameter.dim() != 2:
        raise _flattened(name, f"of shape {tuple(parameter.shape)} now")
    if not is_sharded(parameter):
        return
    assert isinstance(parameter, DTensor)
    ours = holder_of(parameter) is not None
    if ours and _shard_dim(parameter) is not None:
        return
    layout = f"{name} is a DTensor with placements {tuple(parameter.placements)} on {parameter.device_mesh}"
    if ours:
        raise ParallelismError(
            f"{layout}: of fully_shard's layouts only Shard(0), with or without replication, is supported for sparse "
            "weights. Call fully_shard without shard_placement_fn and on no tensor-parallel weight, or leave the "
            "weight out with sparsify(..., exclude=...)"
        )
    raise ParallelismError(
        f"{layout}, which torch.distributed.fsdp.fully_shard did not make. Tensor parallelism (parallelize_module, "
        "distribute_tensor) of sparse weights is not supported: shard the model with fully_shard or train it with "
        "DistributedDataParallel, or leave the weight out with sparsify(..., exclude=...)"
    )
