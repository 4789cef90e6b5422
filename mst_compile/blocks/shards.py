"""Weights that are spread over ranks: which part of one lives here, and where its other forms are.

Tensor parallelism makes a Parameter a DTensor that holds some rows or columns on every rank, and multiplies those.
``torch.distributed.fsdp.fully_shard`` stores each Parameter, of either kind, as a DTensor that holds some rows of it,
and puts what it was before, gathered, in its place while the module runs. Parts may cut through blocks and may be
empty. Masks are those of the whole weight, the same on every rank. Who keeps a Parameter in two forms tells by
:func:`remember`; nothing here knows FSDP2.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.weak import TensorWeakRef

from mst_compile.blocks.by_tensor import ByTensor
from mst_compile.blocks.layout import Part, as_matrix, part_of
from mst_compile.blocks.memory import address_of, is_plain
from mst_compile.errors import ParallelismError, WeightError

if TYPE_CHECKING or torch.distributed.is_available():
    import torch.distributed as dist
    from torch.distributed._functional_collectives import AsyncCollectiveTensor
    from torch.distributed.tensor import DTensor, Replicate

    _AVAILABLE = True
else:  # a build of PyTorch without torch.distributed
    _AVAILABLE = False


SERVED = (
    "Sparse weights may be DTensors that are Shard(0), Shard(1) or Replicate() on each dimension of their mesh, cut as "
    "torch.chunk cuts: ColwiseParallel and RowwiseParallel of parallelize_module, distribute_tensor with such "
    "placements, and fully_shard, alone or over these; stacks of matrices Shard(0) or Replicate() alone"
)
FOR_DATA = (
    "For data parallelism over tensor parallelism call fully_shard (torch.distributed.fsdp) on the other dimension of "
    "the mesh, or on two others of which the second has size 1, if every rank shall keep its whole part as under "
    "DistributedDataParallel"
)
_TO_LOCAL = "_ToTorchTensorBackward"  # the node of what DTensor.to_local() returns
_LOCALISED = "_st_info"  # on what torch.distributed.tensor.parallel.ddp makes of DTensors


_PLAN = "_hf_tp_plan"  # on modules whose weights versions 4 and early versions 5 of transformers have cut


class Holder(Protocol):
    """What holds a Parameter in both of its forms."""

    @property
    def sharded(self) -> Tensor:
        """The Parameter that optimizers know."""

    @property
    def whole(self) -> Tensor | None:
        """The copy of it that was gathered, if that is in use now."""


# Sharded and unsharded Parameters -> a weak reference to what holds both. Weak, because that keeps the key alive.
_holders = ByTensor()
# What a rank holds of a DTensor -> a weak reference to that. No attribute: those are copied and saved with tensors.
_held = ByTensor()


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
    """Whether ``tensor`` is a DTensor, of whatever layout."""
    return _AVAILABLE and isinstance(tensor, DTensor)


@torch.no_grad()
def local_part(tensor: Tensor) -> tuple[Tensor, Part]:
    """What this rank holds of ``tensor``.

    Args:
        tensor: ``[rows, cols]``, or a stack of matrices that counts as one, any dtype; an ordinary tensor, or a
            DTensor that leaves every rank one rectangle. Partial sums, as gradients may be, count as whole along their
            dimension of the mesh.

    Returns:
        The local tensor, ``[part.rows, part.cols]``, sharing storage (of a stack if its strides allow that); and which
        part of ``tensor`` it is.

    Raises:
        ParallelismError: the DTensor is laid out in another way.
    """
    if not is_sharded(tensor):
        matrix = as_matrix(tensor)
        return matrix, Part(0, 0, *matrix.shape)
    assert isinstance(tensor, DTensor)
    part = _part(tensor)
    local = tensor.to_local()
    if isinstance(local, AsyncCollectiveTensor):
        local = local.wait()
    local = as_matrix(local)
    if part is None or tuple(local.shape) != (part.rows, part.cols):
        raise ParallelismError(f"a tensor of shape {tuple(tensor.shape)} has {_layout(tensor)}. {SERVED}")
    return local, part


def _part(tensor: DTensor) -> Part | None:
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    return None if coordinate is None else part_of(tensor.shape, tensor.placements, mesh.shape, coordinate)


def _layout(tensor: DTensor) -> str:
    return f"placements {tuple(tensor.placements)} on {tensor.device_mesh}, {tuple(tensor.to_local().shape)} of it here"


def written_at(tensor: Tensor) -> tuple[int, int]:
    """What is another when somebody has written: the version, and where the elements are.

    Of a DTensor those of what this rank holds of it: a write through the one does not show in the version of the other.
    """
    if not is_sharded(tensor):
        return tensor._version, address_of(tensor)
    local = tensor._local_tensor  # type: ignore[attr-defined]
    return tensor._version + local._version, address_of(local)


def sum_over_shards(part: Tensor, tensor: Tensor) -> Tensor:
    """Add up ``part``, computed from this rank's part of ``tensor``, over the ranks that hold the other parts.

    Every rank that holds a part must call it; all get the same sum (``torch.distributed.all_reduce``), in which NaN
    and inf of any rank appear. Partial sums are added up as well. Ordinary tensors: ``part`` itself.
    """
    if not is_sharded(tensor):
        return part
    assert isinstance(tensor, DTensor)
    mesh = tensor.device_mesh
    for dim, placement in enumerate(tensor.placements):
        if not isinstance(placement, Replicate):
            part = part.to(mesh.device_type)  # parts that are offloaded to the host are summed where the group can
            dist.all_reduce(part, group=mesh.get_group(dim))
    return part


def note_local(parameter: Tensor) -> None:
    """Let :func:`behind` know what a DTensor holds here: without gradients ``to_local()`` returns that itself."""
    if is_sharded(parameter):
        _held[parameter._local_tensor] = TensorWeakRef(parameter)  # type: ignore[attr-defined]


def forget_local(parameter: Tensor) -> None:
    """Nothing refers to the DTensor by what it holds here any more."""
    if is_sharded(parameter):
        _held.pop(parameter._local_tensor, None)  # type: ignore[attr-defined]


def behind(local: object) -> object:
    """The DTensor of which ``local`` is what ``to_local()`` has returned; anything else is its own.

    A program may call it before it hands weights to a compiled function, as expert parallelism does. With gradients a
    view comes of it, whose node leads to the Parameter.
    """
    if not _AVAILABLE or type(local) is not Tensor:
        return local
    node = local.grad_fn
    if node is not None:
        return getattr(node.next_functions[0][0], "variable", local) if node.name() == _TO_LOCAL else local
    held = _held.get(local if local._base is None else local._base)
    parameter = None if held is None else held()
    return local if parameter is None else parameter


@torch.no_grad()
def any_nonzero(tensor: Tensor) -> bool:
    """Whether an element of ``tensor``, of any shape, is not 0; all ranks must ask, and get the same answer."""
    local = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return bool(sum_over_shards(local.abs().sum(), tensor))


def lay_out_gradient(parameter: Tensor) -> None:
    """Let the gradient of a DTensor be laid out as the Parameter is: that of a Parameter that is whole on ranks with
    different inputs arrives as partial sums. All ranks must call it."""
    gradient = parameter.grad
    if is_sharded(gradient) and is_sharded(parameter) and gradient.placements != parameter.placements:  # type: ignore[union-attr, attr-defined]
        parameter.grad = gradient.redistribute(placements=parameter.placements)  # type: ignore[union-attr, attr-defined]


def gathered(parameter: Tensor) -> bool:
    """Whether ``parameter`` is what FSDP2 has gathered and puts into modules, and not what optimizers know."""
    holder = holder_of(parameter)
    return holder is not None and holder.sharded is not parameter


def part_multiplied(parameter: Tensor) -> Part | None:
    """The part of a weight that products multiply on this rank; None if it is whole there.

    Args:
        parameter: as modules hold it while they run.
    """
    if not is_sharded(parameter):
        return None
    part = local_part(parameter)[1]
    return None if part.rows * part.cols == parameter.numel() else part


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
        WeightError: neither is it, as the module computes it now.
    """
    parameter = held_parameter(module, attribute)
    if parameter is None:
        computed = _computed_from(module, attribute)
        if computed:
            raise WeightError(
                f"the Parameter {name} that was made sparse is gone from its {type(module).__name__}, which computes "
                f"it of {' and '.join(computed)} since, as after torch.nn.utils.prune, weight_norm or spectral_norm. "
                "Apply them before sparsify, which then leaves the layer dense, or take them off again "
                "(prune.remove, remove_parametrizations)"
            )
        raise _flattened(name, f"gone from its {type(module).__name__}")
    return parameter


def _computed_from(module: nn.Module, attribute: str) -> list[str]:
    """Names of the Parameters that ``module`` computes ``attribute`` of: those of a parametrization of it with several
    originals, or of what torch.nn.utils.prune, weight_norm and spectral_norm put in its place."""
    parametrizations = module._modules.get("parametrizations")
    inside = parametrizations._modules.get(attribute) if parametrizations is not None else None
    if inside is not None:
        return [f"parametrizations.{attribute}.{name}" for name in inside._parameters]
    if not isinstance(getattr(module, attribute, None), Tensor):
        return []
    return [name for name in module._parameters if name.startswith(f"{attribute}_")]


def held_parameter(module: nn.Module, attribute: str) -> nn.Parameter | None:
    """The Parameter, as optimizers know it, that ``module`` holds as ``attribute``, also under a parametrization of it;
    None if it is there no more."""
    parameter = module._parameters.get(attribute)
    if parameter is not None and not _holders.data:  # as it nearly always is, and asked for at every step
        return parameter
    if parameter is None:
        parametrizations = module._modules.get("parametrizations")
        inside = parametrizations._modules.get(attribute) if parametrizations is not None else None
        parameter = None if inside is None else inside._parameters.get("original")
    return None if parameter is None else stored(parameter)  # type: ignore[return-value]


def is_made_of_others(parameter: Tensor) -> bool:
    """Whether FSDP1 has made this Parameter of others, or a view of such a one, or DistributedDataParallel of the local
    tensor of a DTensor."""
    base = parameter._base if parameter._is_view() else parameter
    flat = getattr(base, "_is_flat_param", False) or getattr(parameter, "_is_flat_param", False)
    return flat or hasattr(parameter, _LOCALISED)


def is_copied_by(parameter: Tensor, optimizer: Optimizer) -> bool:
    """Whether DeepSpeed lets ``optimizer`` train a copy of the Parameter in its place, of which this rank holds a
    part."""
    stage3 = getattr(parameter, "_z3_optimizer", None)
    if stage3 is not None:
        return getattr(stage3, "optimizer", None) is optimizer
    copy = getattr(getattr(parameter, "_hp_mapping", None), "hp_fragment", None)
    if not isinstance(copy, Tensor):
        return False
    memory = copy.untyped_storage().data_ptr()
    trained = (p for group in optimizer.param_groups for p in group["params"])
    return any(is_plain(p) and p.untyped_storage().data_ptr() == memory for p in trained)


def _flattened(name: str, what: str) -> ParallelismError:
    return ParallelismError(
        f"the Parameter {name} that was made sparse is {what}. FSDP1 (FullyShardedDataParallel) flattens Parameters, "
        "DistributedDataParallel over tensor parallelism takes them out of their modules, neither is supported. Use "
        f"torch.distributed.fsdp.fully_shard. {FOR_DATA}"
    )


def unsharded(parameter: Tensor) -> Tensor | None:
    """The copy that FSDP2 has gathered of a sharded ``parameter``, if it is in use now; over tensor parallelism it is
    itself a DTensor. Changes of ``parameter`` must be made in it too: it is gathered anew only after it was freed."""
    if not is_sharded(parameter):
        return None
    holder = holder_of(parameter)
    return holder.whole if holder is not None and parameter is holder.sharded else None


def check_not_cut(name: str, parameter: Tensor, module: nn.Module) -> None:
    """Raise :class:`ParallelismError` if transformers has cut ``parameter``, which ``module`` holds, into local
    tensors: each rank would take its part for the whole, and masks would not be those of one process.

    Args:
        name: of the weight, for the message.
    """
    plan = getattr(module, _PLAN, None)
    if not is_sharded(parameter) and isinstance(plan, str) and ("colwise" in plan or "rowwise" in plan):
        raise ParallelismError(
            f"{name} is a local tensor of {tuple(parameter.shape)}, one rank's part of what transformers has cut by "
            f"its plan {plan!r}. {SERVED}. Newer versions of transformers make DTensors (5.24: from_pretrained(..., "
            "distributed_config=DistributedConfig(tp_size=...))); or load the model whole and cut it with "
            "parallelize_module"
        )


def check_placement(name: str, parameter: Tensor) -> None:
    """Raise :class:`ParallelismError` unless ``parameter`` can be trained sparse: it is an ordinary tensor, or a
    DTensor of which every rank holds one rectangle.

    Args:
        name: of the weight, for the message.
        parameter: of any dtype, ``[rows, cols]``, or a stack of such matrices.
    """
    if hasattr(parameter, _LOCALISED):
        raise ParallelismError(
            f"the tensor-parallel Parameter {name} is a local tensor of {tuple(parameter.shape)} now, as "
            f"DistributedDataParallel with a device mesh makes them. {FOR_DATA}"
        )
    if parameter.dim() not in (2, 3):
        raise _flattened(name, f"of shape {tuple(parameter.shape)} now")
    if not is_sharded(parameter):
        return
    assert isinstance(parameter, DTensor)
    part = _part(parameter)
    partial = any(placement.is_partial() for placement in parameter.placements)
    if partial or part is None or parameter.to_local().numel() != part.rows * part.cols:
        raise ParallelismError(
            f"{name} is a DTensor of shape {tuple(parameter.shape)} with {_layout(parameter)}. {SERVED}, or leave the "
            "weight out with sparsify(..., exclude=...)"
        )
