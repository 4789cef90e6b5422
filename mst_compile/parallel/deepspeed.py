"""Follow DeepSpeed, whose optimizers train copies of a model's weights: ZeRO, and masters of bfloat16 and float16.

DeepSpeed is not imported here. Once it is in the process, ``step`` of its optimizers that are served is wrapped: they
are none of PyTorch's classes, so no hook tells of them. Which elements of which weight a copy holds follows from where
the weight lies in memory.
"""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from mst_compile.errors import MSTWarning, ParallelismError
from mst_compile.state.binding import come_first
from mst_compile.state.masters import Piece, find_by
from mst_compile.state.run import Run
from mst_compile.state.stepping import watch_runs
from mst_compile.state.steps import watched
from mst_compile.state.weight import SparseWeight

_WATCHED = "_mst_watched"
_KEEPER = "_mst_keeper"
_OWN_UPDATES = "Muon"  # in the name of optimizers for which DeepSpeed makes another update out of gradients


class _Keeper:
    """One of DeepSpeed's optimizers as a :class:`mst_compile.state.masters.Keeper`.

    Args:
        outer: it.
        served: how it is read.
    """

    def __init__(self, outer: Any, served: _Served) -> None:
        self._told = False  # that elastic checkpoints hold no masks
        self._outer = weakref.ref(outer)
        self._served = served
        self._known: tuple[list[tuple[int, int]], list[_Group]] | None = None

    def _them(self) -> list[_Group]:
        """What is where: read anew only when something lies elsewhere, as DeepSpeed can move it to the host and back;
        asked for several times a step."""
        outer = self._outer()
        if outer is None:
            return []
        tensors = [tensor for name in self._served.tensors for tensor in _tensors(getattr(outer, name))]
        key = [(id(tensor), tensor.data_ptr()) for tensor in tensors]
        if self._known is None or self._known[0] != key:
            self._known = key, self._served.groups(outer)
        return self._known[1]

    @property
    def optimizer(self) -> Optimizer:
        found: Optimizer = self._outer().optimizer  # type: ignore[union-attr]
        return found

    def pieces(self) -> list[Piece]:
        return [piece for group in self._them() for piece in group.pieces]

    def beside(self, master: Tensor) -> Sequence[Tensor]:
        group = next((g for g in self._them() if any(piece.master is master for piece in g.pieces)), None)
        return [] if group is None else group.parameters

    def team(self) -> Sequence[int]:
        found: list[int] = []
        for group in self._them():
            found += [] if group.ranks is None else dist.get_process_group_ranks(group.ranks)
        return sorted(set(found))

    def check(self) -> None:
        outer = self._outer()
        if getattr(outer, "elastic_checkpoint", False) and not self._told:
            self._told = True
            warnings.warn(
                "DeepSpeed's elastic checkpoints hold no masks: save them with client_state={'sparsifier': "
                "sparsifier(model).state_dict()} and load them again, or leave elastic_checkpoint out",
                MSTWarning,
                stacklevel=8,
            )
        if _OWN_UPDATES in type(self.optimizer).__name__:
            raise ParallelismError(
                f"DeepSpeed orthogonalises gradients before {type(self.optimizer).__name__} steps its copies of "
                "weights, so that growth would read updates in their place, and its momenta are those of whole "
                "matrices. Use AdamW with DeepSpeed, or torch.optim.Muon without it"
            )
        for legacy in ("fused_adam_legacy", "fused_lamb_legacy"):
            if getattr(outer, legacy, False):
                raise ParallelismError(
                    f"{type(outer).__name__} hands gradients to its optimizer in a way of its own ({legacy}), in which "
                    "they cannot be masked. Use another optimizer, or ZeRO stage 1"
                )


def _tensors(found: Iterable[Any]) -> Iterator[Tensor]:
    """Those in a list, or in a list of lists."""
    for one in found:
        yield from [one] if isinstance(one, Tensor) else one


class _Group:
    """The Parameters of one parameter group, in an order that is the same on all ranks, and what of them is where."""

    def __init__(self, parameters: Sequence[Tensor], pieces: list[Piece], ranks: Any = None) -> None:
        self.parameters = parameters
        self.pieces = pieces
        self.ranks = ranks


# -- what DeepSpeed's optimizers have ----------------------------------------------------------------------------------


def _spread(parameters: Sequence[Any], flat: Tensor, copy: Tensor, ranks: dist.ProcessGroup) -> _Group:
    """Of Parameters that lie in one flat tensor, of which each rank trains a copy of its part.

    Where one lies is read off its memory: ``_hp_mapping``, which DeepSpeed gives it, does not know the order that
    ``round_robin_gradients`` makes (0.19.8).
    """
    several = ranks if dist.get_world_size(ranks) > 1 else None
    begin = dist.get_rank(ranks) * copy.numel()
    memory = flat.untyped_storage().data_ptr()
    pieces = []
    for parameter in parameters:
        if parameter.untyped_storage().data_ptr() != memory:
            raise ParallelismError(
                f"a Parameter of shape {tuple(parameter.shape)} does not lie where DeepSpeed has put it: after "
                "deepspeed.initialize it may not be moved or given other memory (parameter.data = ...)"
            )
        at = parameter.storage_offset() - flat.storage_offset()
        first, last = max(at, begin), min(at + parameter.numel(), begin + copy.numel())
        if first < last:
            pieces.append(Piece(parameter, copy, first - begin, first - at, last - first, several))
        else:
            pieces.append(Piece(parameter, copy, 0, 0, 0, several))
    return _Group(parameters, pieces, ranks)


def _zero_1_and_2(outer: Any) -> list[_Group]:
    """``DeepSpeedZeroOptimizer``: stages 1 and 2."""
    flats, copies = outer.bit16_groups_flat, outer.single_partition_of_fp32_groups
    own = zip(outer.bit16_groups, flats, copies, outer.real_dp_process_group, strict=True)
    return [_spread(*group) for group in own]


def _bf16(outer: Any) -> list[_Group]:
    """``BF16_Optimizer``: stage 1 in bfloat16 with gradients added up in float32."""
    flats, copies = outer.bf16_groups_flat, outer.fp32_groups_flat_partition
    own = zip(outer.bf16_groups, flats, copies, outer.real_dp_process_group, strict=True)
    return [_spread(*group) for group in own]


def _flat(outer: Any) -> list[_Group]:
    """``FP16_Optimizer``: float16 or bfloat16 without ZeRO, all copies of a group in one tensor on each rank."""
    found = []
    for parameters, flat in zip(outer.fp16_groups, outer.fp32_groups_flat, strict=True):
        pieces, at = [], 0
        for parameter in parameters:
            pieces.append(Piece(parameter, flat, at, 0, parameter.numel()))
            at += parameter.numel()
        found.append(_Group(parameters, pieces))
    return found


def _alone(outer: Any) -> list[_Group]:
    """``FP16_UnfusedOptimizer``: likewise, with a copy of each Parameter."""
    own = zip(outer.fp16_groups, outer.fp32_groups, strict=True)
    return [
        _Group(parameters, [Piece(p, copy, 0, 0, p.numel()) for p, copy in zip(parameters, copies, strict=True)])
        for parameters, copies in own
    ]


class _Served(NamedTuple):
    """How one of DeepSpeed's optimizers is read.

    Attributes:
        groups: its parameter groups.
        tensors: its attributes that hold what Parameters and copies lie in.
    """

    groups: Callable[[Any], list[_Group]]
    tensors: tuple[str, ...]


_SERVED: dict[tuple[str, str], _Served] = {
    ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer"): _Served(
        _zero_1_and_2, ("bit16_groups_flat", "single_partition_of_fp32_groups")
    ),
    ("deepspeed.runtime.bf16_optimizer", "BF16_Optimizer"): _Served(
        _bf16, ("bf16_groups_flat", "fp32_groups_flat_partition")
    ),
    ("deepspeed.runtime.fp16.fused_optimizer", "FP16_Optimizer"): _Served(_flat, ("fp32_groups_flat",)),
    ("deepspeed.runtime.fp16.unfused_optimizer", "FP16_UnfusedOptimizer"): _Served(_alone, ("fp32_groups",)),
}


def _keeper(outer: Any) -> _Keeper | None:
    """Of one of DeepSpeed's optimizers; None of a class that is not served, as one that is derived from a served one
    and does something else."""
    found: _Keeper | None = vars(outer).get(_KEEPER)
    served = _SERVED.get((type(outer).__module__, type(outer).__qualname__))
    if found is None and served is not None and isinstance(getattr(outer, "optimizer", None), Optimizer):
        found = _Keeper(outer, served)
        setattr(outer, _KEEPER, found)
    return found


# -- where they are met ------------------------------------------------------------------------------------------------


def _classes() -> Iterator[type]:
    """Those of the served classes that are in this process."""
    for module, name in _SERVED:
        cls = getattr(sys.modules.get(module), name, None)
        if isinstance(cls, type):
            yield cls


def follow() -> None:
    """Let the steps of DeepSpeed's optimizers be watched, if DeepSpeed is in this process."""
    if "deepspeed" not in sys.modules:
        return
    for cls in _classes():
        if not vars(cls).get(_WATCHED, False):
            cls.step = watched(cls.step, _keeper)  # type: ignore[attr-defined]
            setattr(cls, _WATCHED, True)


def adopt(parameters: Iterable[Tensor]) -> None:
    """Weights have become sparse, of which DeepSpeed may have copies already: its hooks take gradients as they arrive,
    and shall take masked ones."""
    follow()
    for parameter in parameters:
        if hasattr(parameter, "_hp_mapping"):
            come_first(parameter)


_known: weakref.WeakKeyDictionary[Optimizer, weakref.ref[_Keeper]] = weakref.WeakKeyDictionary()


def _find(optimizer: Optimizer) -> _Keeper | None:
    """Who steps ``optimizer``: looked for among all objects that the garbage collector knows, which takes a moment. It
    is asked when optimizers are saved and loaded."""
    own = (p for group in optimizer.param_groups for p in group["params"])
    if "deepspeed" not in sys.modules or all(isinstance(p, nn.Parameter) for p in own):
        return None  # copies are plain tensors
    reference = _known.get(optimizer)
    found = None if reference is None else reference()
    if found is None:
        classes = set(_classes())
        outers = (o for o in gc.get_objects() if type(o) in classes and vars(o).get("optimizer") is optimizer)
        outer = next(outers, None)
        found = None if outer is None else _keeper(outer)
        if found is not None:
            _known[optimizer] = weakref.ref(found)
    return found


class _Follower:
    """A :class:`mst_compile.state.stepping.RunWatcher`."""

    def first_gradient(self, run: Run, weight: SparseWeight, parameter: Tensor) -> None:
        """DeepSpeed may have been imported since."""
        follow()

    def first_step(self, run: Run) -> None:
        """Nothing to do."""


if torch.distributed.is_available():
    watch_runs(_Follower())
    find_by(_find)
