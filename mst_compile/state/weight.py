"""The sparse state of one weight, and how to get from a Parameter to it.

The state hangs on the Parameter object itself, because that is what a compiled graph receives at every call: one
compiled graph then serves all layers that Dynamo shares it among.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mst_compile.blocks.bulk import zero_inactive_
from mst_compile.blocks.grid import BlockGrid
from mst_compile.blocks.index import DENSE_GRAD, new_index, write_index
from mst_compile.blocks.shards import check_placement, is_sharded, stored
from mst_compile.rules.density import active_count
from mst_compile.rules.guard import Guard, coverage
from mst_compile.rules.guard import backbone as wrapped_diagonal
from mst_compile.state.attention import AttentionState
from mst_compile.state.selection import Candidate
from mst_compile.state.uses import Uses

_ATTRIBUTE = "_mst_weight"
_hooks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # parameter -> handle of its gradient hook


@dataclass(eq=False)
class SparseWeight:
    """Block mask, packed index and bookkeeping of one weight.

    Attributes:
        name: the parameter's name in the model.
        grid: the block grid over the weight as stored.
        density_target: density that the layer distribution gives at the schedule's highest sparsity.
        mask: bool ``[R, C]`` on the CPU, the active blocks.
        backbone: bool ``[R, C]``, the backbone, active in first masks; empty without a guard.
        guard: which blocks a topology event may not drop.
        index: the packed index on the weight's device; ``None`` for ``block == 1``.
        note: why the block differs from the one asked for, or why the weight stays dense.
        active: number of elements in active blocks.
        changes: number of topology changes so far.
        scores: growth scores since the last event, float32 ``[R, C]``; None where nothing was read.
        grown: blocks that grew at the last event and have not been stepped since, bool ``[R, C]``, or None.
        loaded: values of a checkpoint that the present masks cut, until masks are loaded or a step is taken.
    """

    name: str
    grid: BlockGrid
    density_target: float
    mask: Tensor
    backbone: Tensor
    guard: Guard
    index: Tensor | None
    tied: bool = False
    note: str = ""
    active: int = 0
    changes: int = 0
    dense_grad: bool = False
    scores: Tensor | None = None
    grown: Tensor | None = None
    loaded: Tensor | None = None
    attention: AttentionState = field(default_factory=AttentionState)
    uses: Uses = field(default_factory=Uses)

    @classmethod
    def create(cls, candidate: Candidate, guard: Guard, attention: AttentionState) -> SparseWeight:
        """A weight whose blocks are all active."""
        grid = candidate.grid
        assert grid is not None
        mask = torch.ones(grid.shape, dtype=torch.bool, device="cpu")
        backbone = torch.zeros_like(mask) if guard == "none" else wrapped_diagonal(grid.shape)
        index = None if grid.block == 1 else new_index(grid, candidate.parameter.device)
        density, tied, note = candidate.density, candidate.tied, candidate.note
        weight = cls(candidate.name, grid, density, mask, backbone, guard, index, tied, note, attention=attention)
        weight.set_mask(mask)
        return weight

    def __post_init__(self) -> None:
        # Plain attributes: the backend reads them at every call.
        self.numel = self.grid.rows * self.grid.cols
        self.signature = (self.grid.rows, self.grid.cols, self.grid.block)

    @property
    def density(self) -> float:
        """Share of the elements that lie in active blocks."""
        return self.active / self.numel

    @property
    def is_dense(self) -> bool:
        """Whether every block is active."""
        return self.active == self.numel

    def blocks_at(self, density: float) -> int:
        """Number of active blocks at a target density."""
        return active_count(density, self.grid.blocks, max(1, int(self.backbone.sum())))

    def safe_blocks(self, magnitude: Tensor) -> Tensor:
        """Blocks that a topology event may not drop, bool ``[R, C]``, given the blocks' ``magnitude``."""
        return coverage(self.mask, magnitude) if self.guard == "coverage" else self.backbone

    def set_mask(self, mask: Tensor) -> None:
        """Take over ``mask`` and write the index in place."""
        self.mask = mask
        self.active = self.grid.count_elements(mask)
        self.changes += 1
        if self.index is not None:
            write_index(self.index, self.grid, mask, dense_grad=self.dense_grad)

    def set_dense_grad(self, wanted: bool) -> None:
        """Ask kernels for the gradient on all blocks (growth reads it), or on the active ones alone."""
        if wanted != self.dense_grad:
            self.dense_grad = wanted
            if self.index is not None:
                self.index[DENSE_GRAD] = int(wanted)

    def zero_inactive_(self, tensor: Tensor) -> None:
        """Set a tensor of the weight's shape to 0 outside the active blocks, in place."""
        if not self.is_dense:
            zero_inactive_(tensor, self.grid, self.mask, self.index)

    def to_device(self, device: torch.device) -> None:
        """Follow a weight that was moved."""
        if self.index is not None and self.index.device != device:
            self.index = self.index.to(device)


def bind(parameter: Tensor, weight: SparseWeight) -> bool:
    """Make ``weight`` the sparse state of ``parameter`` and have its gradients masked; returns whether that is new.

    Safe to call again, and on frozen parameters.
    """
    changed = of(parameter) is not weight
    if changed:
        _remove_hook(parameter)
        setattr(parameter, _ATTRIBUTE, weight)
    if not is_sharded(parameter):  # FSDP2 may keep shards on the host: the index belongs where products are computed
        weight.to_device(parameter.device)
    if parameter not in _hooks:
        # The hook holds no more than the weight's state: one that led back to the parameter would never be freed.
        hook = torch._dynamo.disable(functools.partial(_mask_gradient, weight))
        frozen = not parameter.requires_grad  # it may be unfrozen later, and a hook is only taken by one that is not
        _hooks[parameter] = parameter.requires_grad_(True).register_post_accumulate_grad_hook(hook)
        parameter.requires_grad_(not frozen)
        changed = True
    return changed


def unbind(parameter: Tensor) -> None:
    """Remove the sparse state of ``parameter`` and its hook; also where FSDP2 would carry it here from again."""
    for holder in (parameter, stored(parameter)):
        _remove_hook(holder)
        if hasattr(holder, _ATTRIBUTE):
            delattr(holder, _ATTRIBUTE)


def _remove_hook(parameter: Tensor) -> None:
    handle = _hooks.pop(parameter, None)
    if handle is not None:
        handle.remove()


def _mask_gradient(weight: SparseWeight, parameter: Tensor) -> None:
    """Post-accumulate hook: gradients are zero outside the active blocks, whoever computed them."""
    if parameter.grad is not None and not weight.is_dense and not weight.dense_grad:
        weight.zero_inactive_(parameter.grad)


def of(parameter: object) -> SparseWeight | None:
    """The sparse state of ``parameter``, or ``None``."""
    return getattr(parameter, _ATTRIBUTE, None)


def bound() -> list[tuple[str, Tensor]]:
    """Names and Parameters of all sparse weights of this process that are alive."""
    return [(weight.name, p) for p in _hooks if (weight := of(p)) is not None]


def carry(old: Tensor, new: Tensor) -> None:
    """Let a Parameter that takes another's place, as FSDP2's do, have the other's sparse state, also if it has none."""
    weight = of(old)
    if weight is of(new):
        return
    if weight is None:
        unbind(new)
        return
    check_placement(weight.name, new)
    bind(new, weight)
