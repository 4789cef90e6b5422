"""Weights that are spread over ranks: which rows of one live here, and how FSDP2 passes it around.

``torch.distributed.fsdp.fully_shard`` stores each Parameter as a DTensor that holds some rows on every rank (row
shards may cut through blocks and may be empty), and puts a whole, "unsharded" Parameter in its place while the module
runs. Masks and index are those of the whole weight, the same on every rank.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .errors import ParallelismError

if TYPE_CHECKING or torch.distributed.is_available():
    import torch.distributed as dist
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
    from torch.distributed.tensor import DTensor, Replicate, Shard

    _AVAILABLE = True
else:  # a build of PyTorch without torch.distributed
    _AVAILABLE = False

Carry = Callable[[Tensor, Tensor], None]

# Sharded and unsharded Parameters -> a weak reference to the FSDPParam that holds both. Weak, because the FSDPParam
# keeps the key alive.
_managers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


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
    manager = _manager(parameter)
    return parameter if manager is None else manager.sharded_param


def parameter_of(name: str, module: nn.Module, attribute: str) -> nn.Parameter:
    """The Parameter, as optimizers know it, of the weight ``name`` that ``module`` holds as ``attribute``.

    Raises:
        ParallelismError: it is there no more.
    """
    parameter = module._parameters.get(attribute)
    if parameter is None:
        raise _flattened(name, f"gone from its {type(module).__name__}")
    return stored(parameter)  # type: ignore[return-value]


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
    manager = _manager(parameter)
    if manager is None or parameter is not manager.sharded_param or manager.sharded_state.name != "UNSHARDED":
        return None
    return manager._unsharded_param


def check_placement(name: str, parameter: Tensor, model: nn.Module | None = None) -> None:
    """Raise :class:`ParallelismError` unless ``parameter`` can be trained sparse: it is an ordinary tensor, or sharded
    by FSDP2 on dimension 0 (a replicated second mesh dimension, HSDP, included).

    Args:
        name: of the weight, for the message.
        parameter: of any dtype, ``[rows, cols]``.
        model: where to look for the FSDP2 module that manages ``parameter``, in case it was sharded before this
            package was imported.
    """
    if parameter.dim() != 2:
        raise _flattened(name, f"of shape {tuple(parameter.shape)} now")
    if not is_sharded(parameter):
        return
    assert isinstance(parameter, DTensor)
    if model is not None:
        _remember_all(model)
    ours = _manager(parameter) is not None
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


def _manager(parameter: Tensor) -> FSDPParam | None:
    if not _managers.data:  # without FSDP2 this is asked for every weight at every step: it should cost nothing
        return None
    reference = _managers.get(parameter)
    return None if reference is None else reference()


def _remember(manager: FSDPParam) -> None:
    for parameter in (manager.sharded_param, getattr(manager, "_unsharded_param", None)):
        if parameter is not None and _manager(parameter) is not manager:
            _managers[parameter] = weakref.ref(manager)


def _remember_all(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            state: Any = module._get_fsdp_state()
            # Up to torch 2.12 a module has one group of parameters.
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            for group in groups:
                for manager in group.fsdp_params if group is not None else ():
                    _remember(manager)


def follow_fsdp(carry: Carry) -> None:
    """Have ``carry(old, new)`` called whenever FSDP2 puts the Parameter ``new`` in the place of ``old``.

    That is when ``fully_shard`` shards a Parameter, when a checkpoint brings another one (``load_state_dict(...,
    assign=True)``), and at every all-gather, before forward and backward, from the sharded Parameter to the unsharded
    one. FSDP2 has no hook at these points that leaves compiled graphs alone (a module's forward hook would break
    them), so three methods of its internal ``FSDPParam`` are wrapped, once.
    """
    if not _AVAILABLE:
        return

    def after(method: str, then: Callable[[FSDPParam, Tensor], None]) -> None:
        original = getattr(FSDPParam, method)

        @functools.wraps(original)
        def wrapper(self: FSDPParam, *args: Any, **kwargs: Any) -> Any:
            before = args[0] if method == "__init__" else self.sharded_param
            result = original(self, *args, **kwargs)
            then(self, before)
            return result

        setattr(FSDPParam, method, wrapper)

    def sharded_anew(manager: FSDPParam, before: Tensor) -> None:
        _remember(manager)
        if manager.sharded_param is not before:
            carry(before, manager.sharded_param)

    def gathered(manager: FSDPParam, before: Tensor) -> None:
        _remember(manager)
        carry(before, manager._unsharded_param)

    after("__init__", sharded_anew)
    after("reset_sharded_param", sharded_anew)
    after("init_unsharded_param", gathered)
